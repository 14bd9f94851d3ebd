"""The planner against an exhaustive search, and what it says when nothing fits."""

import itertools
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest

from coordinator.planner import Layout, Machine, Objective, Plan, plan, split_evenly
from unicluster.errors import DoesNotFitError, InputError
from unicluster.v1 import node_pb2

GB = 10**9


def a_layout(
    layers: list[int],
    *,
    active: list[int] | None = None,
    head: int = 0,
    kv: list[int] | None = None,
    users: int = 1,
    quant: str = "",
) -> Layout:
    return Layout(
        model_type="llama",
        layer_bytes=tuple(layers),
        layer_active_bytes=tuple(active or layers),
        head_bytes=head,
        kv_bytes_per_layer=tuple(kv or [0] * len(layers)),
        context=8192,
        users=users,
        hidden_bytes=8192,
        quant=quant,
        max_context=0,
    )


def machines(*usable: int, bandwidth: float = 100 * GB) -> list[Machine]:
    return [Machine(f"m{i}", f"m{i}:7711", size, bandwidth) for i, size in enumerate(usable)]


def ranges(found: Plan) -> list[tuple[str, int, int]]:
    return [(stage.machine.name, stage.first, stage.end) for stage in found.stages]


def needs(layout: Layout, first: int, end: int) -> int:
    held = sum(layout.layer_bytes[first:end]) + sum(layout.kv_bytes_per_layer[first:end])
    held += layout.head_bytes if first == 0 else 0
    return held + layout.reserve(held)


def every_plan(layout: Layout, fleet: list[Machine]) -> Iterator[tuple[float, float]]:
    """(latency, slowest stage) in seconds of each placement that fits."""
    for count in range(1, min(len(fleet), layout.layers) + 1):
        for cut in itertools.combinations(range(1, layout.layers), count - 1):
            spans = list(itertools.pairwise((0, *cut, layout.layers)))
            for order in itertools.permutations(fleet, count):
                pairs = list(zip(order, spans, strict=True))
                if any(needs(layout, *span) > m.usable for m, span in pairs):
                    continue
                times = [
                    (
                        sum(layout.layer_active_bytes[a:b])
                        + sum(layout.kv_bytes_per_layer[a:b]) / layout.users
                        + (layout.head_bytes if a == 0 else 0)
                    )
                    / m.bandwidth
                    for m, (a, b) in pairs
                ]
                hops = sum(m.hop_s for m in order) if count > 1 else 0.0
                yield sum(times) + hops, max(times)


def a_fleet(dice: random.Random) -> tuple[Layout, list[Machine]]:
    """A small model of unequal layers and machines of which some are alike."""
    count = dice.randint(1, 7)
    sizes = [dice.randint(1, 30) * GB // 10 for _ in range(count)]
    layout = a_layout(
        sizes,
        active=[size // dice.randint(1, 8) for size in sizes],
        head=dice.randint(0, 20) * GB // 10,
        kv=[dice.randint(0, 5) * GB // 10 for _ in sizes],
        users=dice.randint(1, 4),
    )
    kinds = [(dice.randint(5, 100) * GB // 10, dice.choice([50, 200, 800]) * GB) for _ in range(3)]
    fleet = []
    for i in range(dice.randint(1, 4)):
        usable, bandwidth = dice.choice(kinds)
        hop_s = dice.choice([0.3e-3, 0.3e-3, 8e-3])
        fleet.append(Machine(f"m{i}", f"m{i}:7711", usable, bandwidth, hop_s=hop_s))
    return layout, fleet


@pytest.mark.parametrize("seed", range(10))
def test_no_placement_is_better_than_the_plan(seed: int) -> None:
    dice = random.Random(seed)  # noqa: S311
    for _ in range(100):
        layout, fleet = a_fleet(dice)
        possible = list(every_plan(layout, fleet))
        if not possible:
            with pytest.raises(DoesNotFitError):
                plan(layout, fleet)
            continue
        fastest = plan(layout, fleet, "latency")
        assert fastest.seconds_per_token == pytest.approx(min(possible)[0], rel=1e-9)
        steady = plan(layout, fleet, "throughput")
        slowest, latency = min((round(slow, 12), latency) for latency, slow in possible)
        assert steady.slowest.seconds_per_token == pytest.approx(slowest, rel=1e-9)
        assert steady.seconds_per_token == pytest.approx(latency, rel=1e-6)


@pytest.mark.parametrize("objective", ["latency", "throughput"])
def test_stages_cover_all_layers_once_and_fit(objective: Objective) -> None:
    dice = random.Random(99)  # noqa: S311
    layout = a_layout([dice.randint(1, 30) * GB // 10 for _ in range(60)], head=2 * GB)
    fleet = [Machine(f"m{i}", "", 15 * GB, (100 + i) * 1e9) for i in range(9)]
    found = plan(layout, fleet, objective)
    ends = [stage.end for stage in found.stages]
    assert [stage.first for stage in found.stages] == [0, *ends[:-1]]
    assert ends[-1] == 60
    assert sum(stage.weight_bytes for stage in found.stages) == layout.weight_bytes
    assert all(stage.bytes <= stage.machine.usable for stage in found.stages)
    assert [stage.head for stage in found.stages] == [i == 0 for i in range(len(ends))]


def test_a_split_is_found_where_shares_by_memory_fail() -> None:
    layout = a_layout([int(113.5 * GB / 32)] * 32)
    found = plan(layout, machines(28 * GB, 90 * GB))
    assert sorted(stage.end - stage.first for stage in found.stages) == [7, 25]


def test_one_machine_that_holds_everything_needs_no_hop() -> None:
    found = plan(a_layout([GB] * 8), machines(20 * GB, 20 * GB, 20 * GB))
    assert len(found.stages) == 1
    assert found.hops_s == 0.0
    assert [reason.split(":")[0] for _, reason in found.left_out] == ["not needed", "not needed"]


def test_the_fastest_memory_fills_first() -> None:
    slow, fast = Machine("slow", "", 20 * GB, 100e9), Machine("fast", "", 9 * GB, 800e9)
    found = plan(a_layout([GB] * 16), [slow, fast])
    layers = {name: end - first for name, first, end in ranges(found)}
    assert layers == {"fast": 8, "slow": 8}


def test_throughput_uses_every_machine_that_makes_the_slowest_stage_faster() -> None:
    found = plan(a_layout([GB] * 12, users=4), machines(*[20 * GB] * 3), "throughput")
    assert [stage.end - stage.first for stage in found.stages] == [4, 4, 4]
    assert found.tokens_per_s_aggregate > 2.9 * found.tokens_per_s_single


def test_slices_of_megabytes_hold_a_small_model() -> None:
    layout = a_layout([800_000] * 12, head=900_000, kv=[20_000] * 12)
    found = plan(layout, machines(6_000_000, 6_000_000, 6_000_000))
    assert sum(stage.end - stage.first for stage in found.stages) == 12


def test_big_stages_keep_the_full_reserve() -> None:
    found = plan(a_layout([GB] * 64), machines(80 * GB))
    assert found.stages[0].reserve_bytes == 256 * 2**20 + 16 * 8 * 2**20


def test_idle_experts_cost_memory_but_no_time() -> None:
    found = plan(a_layout([10 * GB] * 4, active=[GB] * 4), machines(50 * GB))
    assert found.seconds_per_token == pytest.approx(4 * GB / (100 * GB))


def test_only_the_nodes_asked_for_are_used() -> None:
    found = plan(a_layout([GB] * 8), machines(20 * GB, 20 * GB), nodes=["m1"])
    assert ranges(found) == [("m1", 0, 8)]
    assert found.left_out[0][1] == "not among the nodes asked for"


def test_an_unknown_node_is_named_with_those_there() -> None:
    with pytest.raises(InputError, match="no machine named 'mac': there are m0, m1"):
        plan(a_layout([GB]), machines(GB, GB), nodes=["mac"])


def test_a_machine_without_mlx_takes_no_layers() -> None:
    bare = Machine("bare", "", 90 * GB, 900e9, backend="none")
    found = plan(a_layout([GB] * 8), [bare, *machines(20 * GB)])
    assert ranges(found) == [("m0", 0, 8)]
    assert found.left_out == ((bare, "has no MLX installed"),)


def test_a_machine_of_unknown_bandwidth_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="odd states no memory bandwidth"):
        plan(a_layout([GB]), [Machine("odd", "", 9 * GB, 0.0)])


def test_missing_memory_is_counted_and_each_remedy_works() -> None:
    layout = a_layout([6 * GB] * 60, head=GB, quant="q4")
    fleet = machines(100 * GB, 100 * GB, 100 * GB)
    with pytest.raises(DoesNotFitError) as refused:
        plan(layout, fleet, model="deepseek-r1 q4")
    assert str(refused.value) == (
        "deepseek-r1 q4 with context 8192 for 1 user needs 362.2 GB and the 3 machines offer "
        "300.0 GB: 62.2 GB are missing. One more machine with 72.5 GB usable or --quant q3 "
        "would do"
    )
    extra = Machine("extra", "", int(72.5 * GB), 100e9)
    assert len(plan(layout, [*fleet, extra]).stages) == 4


def test_a_machine_smaller_than_the_one_suggested_would_not_do() -> None:
    layout = a_layout([6 * GB] * 60, head=GB)
    extra = Machine("extra", "", int(72.3 * GB), 100e9)
    with pytest.raises(DoesNotFitError):
        plan(layout, [*machines(100 * GB, 100 * GB, 100 * GB), extra])


def test_a_shorter_context_and_fewer_users_are_suggested_when_they_would_do() -> None:
    layout = a_layout([GB] * 10, kv=[GB] * 10, users=4)
    with pytest.raises(DoesNotFitError, match=r"--context 4096 or --users 2 would do$"):
        plan(layout, machines(17 * GB))


def test_layers_too_coarse_for_the_machines_are_told_from_too_little_memory() -> None:
    with pytest.raises(DoesNotFitError) as refused:
        plan(a_layout([10 * GB] * 4), machines(15 * GB, 15 * GB, 19 * GB))
    assert "no cut between layers fits: the nearest misses 1.4 GB on m2." in str(refused.value)


def test_without_machines_the_one_needed_is_told() -> None:
    with pytest.raises(DoesNotFitError, match=r"no machine.*One more machine with 10\.\d GB"):
        plan(a_layout([GB] * 10), [])


@pytest.mark.parametrize("objective", ["latency", "throughput"])
def test_more_unlike_machines_than_are_searched_exactly_still_fit(objective: Objective) -> None:
    layout = a_layout([3 * GB] * 60, head=2 * GB)
    fleet = [Machine(f"m{i}", "", (10 + i % 7) * GB + i, (100 + 17 * i) * 1e9) for i in range(24)]
    found = plan(layout, fleet, objective)
    assert sum(stage.end - stage.first for stage in found.stages) == 60


def test_an_even_split_has_the_smallest_largest_stage() -> None:
    dice = random.Random(5)  # noqa: S311
    for _ in range(60):
        layout = a_layout([dice.randint(1, 9) for _ in range(7)], head=dice.randint(0, 9))
        count = dice.randint(1, 7)
        largest = [
            max(
                sum(layout.layer_bytes[a:b]) + (layout.head_bytes if a == 0 else 0)
                for a, b in itertools.pairwise((0, *cut, 7))
            )
            for cut in itertools.combinations(range(1, 7), count - 1)
        ]
        found = split_evenly(layout, count)
        assert [a for a, _ in found] + [7] == [0] + [b for _, b in found]
        assert len(found) == count
        assert min(largest) == max(
            sum(layout.layer_bytes[a:b]) + (layout.head_bytes if a == 0 else 0) for a, b in found
        )


def test_an_even_split_of_equal_layers_is_even() -> None:
    assert split_evenly(a_layout([5] * 12), 3) == [(0, 4), (4, 8), (8, 12)]
    assert sorted(b - a for a, b in split_evenly(a_layout([5] * 12), 5)) == [2, 2, 2, 3, 3]


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(InputError, match="can't cut 3 layers into 4 stages"):
        split_evenly(a_layout([5] * 3), 4)


def test_layouts_and_machines_come_from_the_wire() -> None:
    layout = Layout.from_proto(
        node_pb2.ModelLayout(
            model_type="llama",
            layer_bytes=[GB, GB],
            layer_active_bytes=[GB, GB],
            head_bytes=GB,
            kv_bytes_per_layer=[1, 2],
            context=4096,
            users=2,
            hidden_bytes=4096,
            quant="q4",
        )
    )
    info = node_pb2.NodeInfo(name="mac", usable_memory=9 * GB, bandwidth=1e11, backend="metal")
    found = plan(layout, [Machine.from_proto(info, "10.0.0.2:7711")])
    assert ranges(found) == [("mac", 0, 2)]


def test_a_layout_that_contradicts_itself_is_refused() -> None:
    with pytest.raises(InputError, match="makes no sense"):
        Layout.from_proto(node_pb2.ModelLayout(model_type="llama", layer_bytes=[1], users=1))


@pytest.mark.parametrize("objective", ["latency", "throughput"])
def test_forbidden_cuts_are_not_used(objective: Objective) -> None:
    layout = replace(a_layout([GB] * 6), forbidden_cuts=(2, 3, 4))

    found = plan(layout, machines(*[int(4.6 * GB)] * 3), objective)

    assert {stage.first for stage in found.stages} <= {0, 1, 5}


def test_what_fits_only_by_a_forbidden_cut_does_not_fit() -> None:
    layout = replace(a_layout([GB] * 4), forbidden_cuts=(1, 2, 3))

    with pytest.raises(DoesNotFitError, match="no cut between layers fits"):
        plan(layout, machines(3 * GB, 3 * GB))


def test_an_even_split_keeps_to_allowed_cuts() -> None:
    layout = replace(a_layout([GB] * 6), forbidden_cuts=(3,))

    assert split_evenly(layout, 2) in ([(0, 2), (2, 6)], [(0, 4), (4, 6)])
    with pytest.raises(InputError, match="into 6 stages: llama allows at most 5"):
        split_evenly(layout, 6)
