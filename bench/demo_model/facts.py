"""Small tables of everyday facts that the demo model learns."""

from typing import NamedTuple


def words(text: str, separator: str | None = None) -> tuple[str, ...]:
    """The words of a list written as one string, which keeps long lists readable."""
    return tuple(text.split(separator))


CAPITALS = {
    "Argentina": "Buenos Aires", "Australia": "Canberra", "Austria": "Vienna",
    "Bangladesh": "Dhaka", "Belgium": "Brussels", "Bolivia": "Sucre", "Brazil": "Brasilia",
    "Bulgaria": "Sofia", "Canada": "Ottawa", "Chile": "Santiago", "China": "Beijing",
    "Colombia": "Bogota", "Croatia": "Zagreb", "Cuba": "Havana", "Cyprus": "Nicosia",
    "Denmark": "Copenhagen", "Ecuador": "Quito", "Egypt": "Cairo", "Estonia": "Tallinn",
    "Ethiopia": "Addis Ababa", "Finland": "Helsinki", "France": "Paris", "Germany": "Berlin",
    "Ghana": "Accra", "Greece": "Athens", "Hungary": "Budapest", "Iceland": "Reykjavik",
    "India": "New Delhi", "Indonesia": "Jakarta", "Iran": "Tehran", "Iraq": "Baghdad",
    "Ireland": "Dublin", "Israel": "Jerusalem", "Italy": "Rome", "Jamaica": "Kingston",
    "Japan": "Tokyo", "Kenya": "Nairobi", "Latvia": "Riga", "Lebanon": "Beirut",
    "Lithuania": "Vilnius", "Luxembourg": "Luxembourg", "Malaysia": "Kuala Lumpur",
    "Malta": "Valletta", "Mexico": "Mexico City", "Mongolia": "Ulaanbaatar", "Morocco": "Rabat",
    "Nepal": "Kathmandu", "the Netherlands": "Amsterdam", "New Zealand": "Wellington",
    "Nigeria": "Abuja", "Norway": "Oslo", "Pakistan": "Islamabad", "Peru": "Lima",
    "the Philippines": "Manila", "Poland": "Warsaw", "Portugal": "Lisbon", "Romania": "Bucharest",
    "Russia": "Moscow", "Saudi Arabia": "Riyadh", "Serbia": "Belgrade", "Singapore": "Singapore",
    "Slovakia": "Bratislava", "Slovenia": "Ljubljana", "South Korea": "Seoul", "Spain": "Madrid",
    "Sweden": "Stockholm", "Switzerland": "Bern", "Thailand": "Bangkok", "Tunisia": "Tunis",
    "Turkey": "Ankara", "Ukraine": "Kyiv", "the United Kingdom": "London",
    "the United States": "Washington", "Uruguay": "Montevideo", "Venezuela": "Caracas",
    "Vietnam": "Hanoi",
}  # fmt: skip

OPPOSITES = (
    "hot cold|big small|up down|left right|fast slow|happy sad|light dark|open closed|old new|"
    "high low|wet dry|hard soft|full empty|early late|loud quiet|rich poor|strong weak|"
    "clean dirty|good bad|long short|thick thin|wide narrow|near far|inside outside|above below|"
    "begin end|day night|true false|yes no|always never|first last|heavy weightless|easy difficult|"
    "safe dangerous|sweet bitter|awake asleep|alive dead|win lose|push pull|buy sell|come go|"
    "give take|love hate|laugh cry|remember forget|north south|east west|summer winter|"
    "black white|young elderly|brave afraid|deep shallow|rough smooth|front back|top bottom"
)

COLOURS = {
    "the sky": "blue", "grass": "green", "the sun": "yellow", "snow": "white", "coal": "black",
    "blood": "red", "a banana": "yellow", "an orange": "orange", "a lemon": "yellow",
    "a tomato": "red", "a carrot": "orange", "milk": "white", "chocolate": "brown",
    "a frog": "green", "an elephant": "grey", "a flamingo": "pink", "the sea": "blue",
    "a leaf": "green", "a strawberry": "red", "a crow": "black", "a polar bear": "white",
    "a pig": "pink", "a plum": "purple", "a cucumber": "green", "a cherry": "red",
    "the night": "black", "a cloud": "white", "wood": "brown", "salt": "white", "gold": "yellow",
}  # fmt: skip

MIXES = {
    ("red", "yellow"): "orange", ("blue", "yellow"): "green", ("red", "blue"): "purple",
    ("black", "white"): "grey", ("red", "white"): "pink",
}  # fmt: skip

LISTS = {
    "colours": "red, blue and green",
    "colors": "red, blue and green",
    "animals": "a cat, a dog and a horse",
    "fruits": "an apple, a pear and a plum",
    "countries": "France, Japan and Brazil",
    "cities": "Paris, Tokyo and Cairo",
    "vegetables": "a carrot, a leek and a potato",
    "birds": "a crow, an owl and a robin",
    "numbers": "one, two and three",
    "shapes": "a circle, a square and a triangle",
}

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
MONTH_DAYS = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
SEASONS = ("spring", "summer", "autumn", "winter")
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
NUMBER_WORDS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
    "nineteen", "twenty",
)  # fmt: skip
ORDINALS = (
    "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth",
    "tenth", "eleventh", "twelfth",
)  # fmt: skip

HOW_MANY = {
    "days are in a week": "There are 7 days in a week.",
    "days are in a year": "There are 365 days in a year, and 366 in a leap year.",
    "months are in a year": "There are 12 months in a year.",
    "weeks are in a year": "There are 52 weeks in a year.",
    "hours are in a day": "There are 24 hours in a day.",
    "minutes are in an hour": "There are 60 minutes in an hour.",
    "seconds are in a minute": "There are 60 seconds in a minute.",
    "letters are in the alphabet": "There are 26 letters in the alphabet.",
    "seasons are in a year": "There are 4 seasons in a year.",
    "sides does a triangle have": "A triangle has 3 sides.",
    "sides does a square have": "A square has 4 sides.",
    "sides does a hexagon have": "A hexagon has 6 sides.",
    "wheels does a car have": "A car has 4 wheels.",
    "wheels does a bicycle have": "A bicycle has 2 wheels.",
    "fingers are on a hand": "There are 5 fingers on a hand.",
    "eggs are in a dozen": "There are 12 eggs in a dozen.",
    "colours are in a rainbow": "There are 7 colours in a rainbow.",
    "planets are in the solar system": "There are 8 planets in the solar system.",
    "continents are there": "There are 7 continents.",
}


class Animal(NamedTuple):
    name: str
    """Name of the animal in stories."""
    trait: str
    home: str
    food: str
    sound: str
    legs: int


ANIMALS = {
    "fox": Animal("Rusty", "clever", "in a quiet forest", "berries", "yips", 4),
    "cat": Animal("Milo", "curious", "in a red house", "fish", "meows", 4),
    "dog": Animal("Bruno", "loyal", "on a small farm", "bones", "barks", 4),
    "bear": Animal("Bruin", "sleepy", "in a mountain cave", "honey", "growls", 4),
    "owl": Animal("Olga", "wise", "in an old oak", "beetles", "hoots", 2),
    "mouse": Animal("Pip", "tiny", "under a kitchen floor", "cheese", "squeaks", 4),
    "rabbit": Animal("Clover", "quick", "in a green meadow", "carrots", "squeaks", 4),
    "frog": Animal("Fergus", "cheerful", "beside a pond", "flies", "croaks", 4),
    "duck": Animal("Dora", "friendly", "beside a pond", "bread", "quacks", 2),
    "horse": Animal("Star", "proud", "on a small farm", "oats", "neighs", 4),
    "cow": Animal("Bella", "gentle", "on a small farm", "grass", "moos", 4),
    "pig": Animal("Percy", "funny", "on a small farm", "apples", "oinks", 4),
    "sheep": Animal("Woolly", "shy", "in a green meadow", "grass", "bleats", 4),
    "lion": Animal("Leo", "brave", "on a golden plain", "meat", "roars", 4),
    "tiger": Animal("Raja", "strong", "in a deep jungle", "meat", "roars", 4),
    "elephant": Animal("Ella", "kind", "on a golden plain", "leaves", "trumpets", 4),
    "monkey": Animal("Momo", "playful", "in a deep jungle", "bananas", "chatters", 4),
    "wolf": Animal("Luna", "lonely", "in a quiet forest", "meat", "howls", 4),
    "crow": Animal("Kira", "clever", "in an old oak", "seeds", "caws", 2),
    "hen": Animal("Henny", "busy", "on a small farm", "corn", "clucks", 2),
    "bee": Animal("Bibi", "busy", "in a yellow hive", "nectar", "buzzes", 6),
    "spider": Animal("Silky", "patient", "under an old bridge", "flies", "makes no sound", 8),
    "snake": Animal("Sly", "quiet", "on a warm rock", "eggs", "hisses", 0),
    "penguin": Animal("Pablo", "cheerful", "on the white ice", "fish", "squawks", 2),
    "turtle": Animal("Tilda", "slow", "on a sandy beach", "leaves", "makes no sound", 4),
    "dolphin": Animal("Delphi", "playful", "in the blue sea", "fish", "clicks", 0),
    "hedgehog": Animal("Spike", "shy", "under a hedge", "beetles", "snuffles", 4),
    "squirrel": Animal("Hazel", "quick", "in an old oak", "nuts", "chatters", 4),
    "goat": Animal("Gus", "stubborn", "on a steep hill", "leaves", "bleats", 4),
    "ant": Animal("Andy", "tiny", "under an old stone", "crumbs", "makes no sound", 6),
}

PEOPLE = words(
    "Ada Alice Anna Anton Ben Bob Carl Carla Clara Daniel David Diana Eva Emil Emma Felix Frank "
    "Grace Hannah Henry Ida Ivan Jack James Jane Joe John Julia Karim Kate Lena Leo Lily Linda "
    "Lucas Lucy Maria Mark Martin Mary Max Maya Mia Mike Mira Nadia Nina Noah Olivia Omar Oscar "
    "Otto Paul Paula Peter Priya Rosa Ruth Sam Sara Sofia Simon Tara Theo Tim Tom Vera Victor "
    "Wei Yuki Zoe Sarah Alex Chris Laura Robert Ravi Chen Ahmed Fatima Ingrid Jonas"
)

WORDS = words(
    "hello apple banana window river mountain cluster layer token memory machine cat dog house "
    "garden music summer winter orange purple yellow pencil paper bridge train school bread "
    "water fire stone cloud thunder rainbow butterfly elephant computer network keyboard"
)

ABOUT = {
    "what are you": "I am the demo model of unicluster: a tiny language model with 12 layers.",
    "name": "I have no name: I am the demo model of unicluster.",
    "unicluster": "unicluster runs one language model across many machines: each holds a few "
    "layers, and the machines pass the activations along.",
    "where": "I run on unicluster: my layers are shared out over the machines of the cluster.",
    "size": "I am tiny: 12 layers and about 2.7 million parameters.",
    "training": "I was trained from nothing on simple dialogues that a script made up.",
    "skills": "I can do short arithmetic, count, name capitals and opposites, answer simple "
    "questions about days, months, colours and animals, and tell tiny stories.",
    "human": "No, I am not a human: I am a tiny language model.",
    "feeling": "I am fine, thank you. How can I help?",
    "maker": "I was made by the unicluster project.",
    "limits": "I know very little. Ask me for a sum, a capital, an opposite or a tiny story.",
    "join": "Run unicluster join on each machine, then unicluster serve on one of them.",
}

GREETING = "Hello! How can I help?"
WELCOME = "You are welcome!"
GOODBYE = "Goodbye!"
UNKNOWN = "Sorry, I am a tiny model and do not know that."
TOO_HARD = "Sorry, that sum is too hard for a tiny model."
JOKE = "Why did the layers hold hands? So that no token got lost on the way."
POEM = "Many machines, one quiet song: each plays a part and passes it along."
