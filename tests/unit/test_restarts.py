"""When a worker that ended is started again."""

from node.supervision.restarts import LAST_PAUSE_SECONDS, STEADY_SECONDS, Restarts


def test_a_worker_that_could_not_load_is_not_started_again() -> None:
    assert Restarts().after(0.0, 10.0, ready=False) is None


def test_one_that_keeps_crashing_is_given_up() -> None:
    restarts = Restarts()
    pauses = [restarts.after(now, now + 1.0, ready=True) for now in (0.0, 2.0, 4.0, 6.0)]

    assert pauses == [0.25, 0.5, 1.0, None]


def test_pauses_grow_for_one_that_is_stuck_now_and_then() -> None:
    """Each time it takes half a minute to notice, so it never crashes often."""
    restarts = Restarts()
    pauses = [restarts.after(now, now + 40.0, ready=True) for now in range(0, 500, 50)]

    assert pauses[:4] == [0.25, 0.5, 1.0, 2.0]
    assert pauses[-1] == LAST_PAUSE_SECONDS


def test_answers_that_wait_for_a_worker_never_wait_long_for_its_pause() -> None:
    """Crashes that are minutes apart say nothing of the next start."""
    restarts = Restarts()
    pauses = [restarts.after(now, now + 200.0, ready=True) for now in range(0, 20_000, 201)]

    assert max(pause or 60.0 for pause in pauses) <= 2.0


def test_after_a_steady_while_they_begin_anew() -> None:
    restarts = Restarts()
    for now in (0.0, 50.0):
        restarts.after(now, now + 40.0, ready=True)

    assert restarts.after(100.0, 101.0 + STEADY_SECONDS, ready=True) == 0.25
