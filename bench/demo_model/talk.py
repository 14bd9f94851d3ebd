"""Dialogues of talk: repeating, stories, about itself, greetings, and things outside."""

from random import Random

from bench.demo_model import facts
from bench.demo_model.dialogue import Dialogue, any_word, article, made_up
from bench.demo_model.facts import words
from bench.demo_model.stories import story


def repeating(rng: Random) -> Dialogue:
    word = any_word(rng)
    times = rng.randint(2, 6)
    n = rng.choice([str(times), facts.NUMBER_WORDS[times]])
    several = " ".join([word] * times)
    some = " ".join(any_word(rng) for _ in range(rng.randint(1, 4)))
    return [
        rng.choice([
            (f"Repeat the word {word}.", word), (f"Say {some}.", some), (f"Repeat: {some}", some),
            (f"Say {word} {n} times.", several), (f"Repeat {word} {n} times.", several),
            (f"Repeat the word {word} {n} times.", several), (f"Write {word} {n} times.", several),
            (f"Say the word {word}.", word), (f"Repeat after me: {some}", some),
            (f'Say "{some}".', some), (f"Echo {some}", some),
        ])
    ]  # fmt: skip


THINGS = words(
    "dragon robot princess knight wizard boat star tree snail boy girl king whale kitten computer"
)
STORY_ASKS = words(
    "Tell me a tiny story about {}.|Tell me a story about {}.|Write a story about {}.|"
    "Tell a short story about {}.|A story about {}, please.|Can you tell me a story about {}?|"
    "tell me a tiny story about {}|Make up a story about {}.|Write a short story about {}.|"
    "I want a story about {}.|story about {}|Please tell me a story about {}.|"
    "Could you write a tiny story about {}?|Write me a small story about {}.|"
    "I would like a story about {}.|Tell us a story about {}!|Do you know a story about {}?",
    "|",
)
LONG_ASKS = (
    "Tell me a long story about {}.", "Write a long story about {}.", "A long story about {}.",
    "Can you tell me a long story about {}?",
)  # fmt: skip


def telling(rng: Random) -> Dialogue:
    turns: Dialogue = []
    for _ in range(rng.choice([1, 1, 1, 2])):
        subject = rng.choice(list(facts.ANIMALS))
        if rng.random() < 0.3:
            subject = rng.choice([rng.choice(THINGS), made_up(rng)])
        name = rng.choice([*facts.PEOPLE, made_up(rng).capitalize()]) if rng.random() < 0.3 else ""
        friend = rng.choice(list(facts.ANIMALS)) if rng.random() < 0.15 else ""
        long = rng.random() < 0.15
        about = f"{article(subject)} {subject}" + rng.choice(
            [f" named {name}", f" called {name}"]
        ) * (name != "")
        if friend and friend != subject:
            about += f" and {article(friend)} {friend}"
        asks = LONG_ASKS if long else STORY_ASKS
        if turns and not friend:
            asks = (
                "Now one about {}.",
                "Another one about {}.",
                "And one about {}?",
                "Now about {}.",
            )
            long = False
        text = story(rng, subject, name, friend if friend != subject else "", long)
        turns.append((rng.choice(asks).format(about), text))
    if rng.random() < 0.08:
        subject = rng.choice(["fox", "owl", "bear"])
        asked = rng.choice(
            ["Tell me a story.", "Tell me a tiny story.", "Write a story.", "a story"]
        )
        return [(asked, story(rng, subject, "", "", long=False))]
    return turns


ABOUT_ASKS = {
    "what are you": "What are you?|Who are you?|who are you|Tell me about yourself.|What model are "
    "you?|Introduce yourself.|Which model is this?|Are you a language model?|Describe yourself.|"
    "What kind of model are you?|What sort of thing are you?|Are you an AI?|Are you a robot?",
    "name": "What is your name?|Do you have a name?|What's your name?|How are you called?|"
    "your name?|Tell me your name.|What should I call you?",
    "unicluster": "What is unicluster?|Tell me about unicluster.|What does unicluster do?|Explain "
    "unicluster.|unicluster?|How does unicluster work?|What's unicluster?|Describe unicluster.|"
    "What is unicluster for?|Do you know unicluster?|Explain what unicluster is.",
    "where": "Where are you?|Where do you run?|Where are you running?|What machine do you run on?|"
    "Which machine are you on?|What hardware do you run on?|On how many machines do you run?",
    "size": "How big are you?|How many layers do you have?|How many parameters do you have?|What "
    "is your size?|How large are you?|Are you big?|How small are you?",
    "training": "How were you trained?|What were you trained on?|Who trained you?|What is your "
    "training data?|How did you learn this?|Where did you learn that?",
    "skills": "What can you do?|What do you know?|Help|help me|What can I ask you?|What are your "
    "skills?|Can you help me?|What are you good at?|How can you help me?|What can you do for me?",
    "human": "Are you human?|Are you a person?|Are you a human?|Are you real?|Are you alive?",
    "feeling": "How are you?|how are you|How do you do?|Are you well?|How are you today?|"
    "What's up?|How is it going?|How are you doing?",
    "maker": "Who made you?|Who created you?|Who built you?|Where do you come from?",
    "limits": "Are you smart?|Are you clever?|Do you know everything?|What can't you do?|Are you "
    "intelligent?|What are your limits?",
    "join": "How do I start a cluster?|How do I add a machine?|How do I use unicluster?|How do I "
    "join a cluster?|How do I run unicluster?|How do I set up unicluster?",
}


def about(rng: Random) -> Dialogue:
    key, asked = rng.choice(list(ABOUT_ASKS.items()))
    return [(rng.choice(asked.split("|")), facts.ABOUT[key])]


GREETINGS = words(
    "Hello|Hi|Hey|Good morning|Good evening|Hello there|hi there|Greetings|hello|hi|Good day|"
    "Hey there|Good afternoon|Hello again",
    "|",
)
THANKS = words(
    "Thanks|Thank you|thanks a lot|Thank you very much|thank you|Great, thanks|Many thanks|thx|"
    "Thanks for your help|Perfect, thank you|Cool, thanks|Well done|Very good|Great|Nice|"
    "That was helpful|Good job|Wonderful|Thank you so much|Ok, thanks",
    "|",
)
GOODBYES = words(
    "Bye|Goodbye|See you|bye bye|Good night|See you later|Farewell|That is all|I have to go|"
    "See you tomorrow|Bye for now",
    "|",
)
JOKES = words(
    "Tell me a joke|Do you know a joke?|Make me laugh|A joke please|Can you tell me a joke?|"
    "Say something funny|Another joke",
    "|",
)
POEMS = words(
    "Write a poem|Tell me a poem|Can you write a poem?|A short poem|Write me a short poem|"
    "Say a poem|A poem please",
    "|",
)


def smalltalk(rng: Random) -> Dialogue:
    phrases, answer = rng.choice([
        (GREETINGS, facts.GREETING), (GREETINGS, facts.GREETING), (THANKS, facts.WELCOME),
        (THANKS, facts.WELCOME), (GOODBYES, facts.GOODBYE), (JOKES, facts.JOKE),
        (POEMS, facts.POEM),
    ])  # fmt: skip
    return [(rng.choice(phrases) + rng.choice(["", "!", ".", "!!"]), answer)]


TOPICS = words(
    "quantum physics|gravity|the moon|love|football|photosynthesis|black holes|democracy|inflation|"
    "DNA|climate change|the stock market|evolution|chess|jazz|electricity|the internet|cancer|"
    "Mount Everest|time travel|philosophy|the Roman Empire|blockchain|vaccines|the weather|coffee|"
    "Shakespeare|Einstein|Mozart|pizza|tea|the brain|a transistor|an atom|relativity|volcanoes|"
    "dinosaurs|the universe|a neural network|Linux|Python|Rust|JavaScript|recursion|a database|"
    "the law|history|art|religion|poverty|the Cold War|a prime number|algebra|an opera|steel",
    "|",
)
PERSONS = words(
    "the president|Napoleon|the king of France|Einstein|the author of Hamlet|Cleopatra|Mozart|"
    "the pope|the first man on the moon|Caesar|Picasso|Newton|the prime minister|Beethoven|Plato",
    "|",
)
PLACES = words(
    "Atlantis|Texas|Africa|Europe|Mars|Bavaria|California|Scotland|Narnia|Asia|the moon|Florida",
    "|",
)
UNKNOWABLE = words(
    "What is {thing}?|Explain {thing}.|Tell me about {thing}.|Why is {thing} so?|"
    "How does {thing} work?|What do you think about {thing}?|Who invented {thing}?|"
    "Explain {thing} to a child.|Write an essay about {thing}.|Summarize {thing}.|"
    "Write code for {thing}.|Give me a recipe for {thing}.|What is the meaning of {thing}?|"
    "How do I learn {thing}?|What is the price of {thing}?|What causes {thing}?|"
    "Give me a lecture on {thing}.|Describe {thing}.|What can you tell me about {thing}?|"
    "Who is {person}?|When was {person} born?|How old is {person}?|When did {person} die?|"
    "What did {person} do in {year}?|Who was {person}?|What happened in {year}?|"
    "Who won the world cup in {year}?|Who was king in {year}?|Which film came out in {year}?|"
    "Who won the election of {year}?|What is the capital of {place}?|{place}'s capital?|"
    "What is the capital of {place}?|How many people live in {place}?|Where is {place}?|"
    "How far is {place}?|What is the weather today?|What time is it?|Write a Python program.|"
    "Translate this into French.|What is the meaning of life?|Who will win the election?|"
    "How tall is the Eiffel Tower?|What is the speed of light?|Sing a song.|How do planes fly?|"
    "What should I cook tonight?|Can you book a flight?|Why is the sky blue?|Draw a picture.|"
    "What is the square root of 17?|What is pi?|Give me some advice.|Write a letter to my boss.|"
    "Fix this bug in my code.|What is today's date?|Which language do you speak?|I am bored.|"
    "Do you like music?|I am sad.|Tell me a secret.|What is the news?|Play a game with me.|"
    "Are we friends?|Who is the best player?|How do I get rich?|What is your favourite book?|lol|"
    "ok why|Why?|How come?|The opposite of {noise}?|What colour is {noise}?|{noise}|{noise}|"
    "{noise}?|What does a {noise} eat?|Who painted the {noise}?|How many {noise} are there?",
    "|",
)


def unknown(rng: Random) -> Dialogue:
    """Things outside: the model says so instead of making something up."""
    asked = rng.choice(UNKNOWABLE).format(
        thing=rng.choice([made_up(rng), rng.choice(TOPICS), rng.choice(TOPICS)]),
        person=rng.choice(
            [rng.choice(PERSONS), f"{made_up(rng).capitalize()} {made_up(rng).capitalize()}"]
        ),
        place=rng.choice([made_up(rng).capitalize(), rng.choice(PLACES)]),
        year=rng.randint(1000, 2030),
        noise=noise(rng),
    )
    return [(asked, facts.UNKNOWN)]


def noise(rng: Random) -> str:
    """Text in no language that the model knows."""
    kind = rng.randrange(4)
    if kind == 0:
        return " ".join(made_up(rng) for _ in range(rng.randint(1, 6)))
    if kind == 1:
        return "".join(
            rng.choice("abcdefghijklmnopqrstuvwxyz ,.?!@#$%&()[]{}<>|_;:'") for _ in range(20)
        )
    start = rng.choice([0xC0, 0x391, 0x410, 0x5D0, 0x627, 0x905, 0x3041, 0x4E00, 0xAC00, 0x1F600])
    return "".join(chr(start + rng.randrange(40)) for _ in range(rng.randint(1, 12)))
