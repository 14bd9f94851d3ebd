"""Plans, and the messages when nothing fits."""

import itertools
import random
from dataclasses import replace

import pytest

from coordinator.planning.placement import BANDWIDTH_SHARE, LAYER_S
from coordinator.planning.planner import Layout, Machine, Objective, Plan, plan, split_evenly
from coordinator.planning.shortfall import NoPlanError
from coordinator.planning.variants import ModelVariants, check_same
from tests.support.fleets import GB, a_layout, a_machine
from unicluster.errors import DoesNotFitError, InputError
from unicluster.v1 import node_pb2


def machines(*usable: int, bandwidth: float = 100 * GB) -> list[Machine]:
    return [a_machine(f"m{i}", size, bandwidth) for i, size in enumerate(usable)]


def ranges(found: Plan) -> list[tuple[str, int, int]]:
    return [(stage.machine.name, stage.first, stage.end) for stage in found.stages]


@pytest.mark.parametrize("objective", ["latency", "throughput"])
def test_stages_cover_all_layers_once_and_fit(objective: Objective) -> None:
    dice = random.Random(99)
    layout = a_layout([dice.randint(1, 30) * GB // 10 for _ in range(60)], head=2 * GB)
    fleet = [a_machine(f"m{i}", 15 * GB, (100 + i) * 1e9) for i in range(9)]
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
    slow, fast = a_machine("slow", 20 * GB, 100e9), a_machine("fast", 9 * GB, 800e9)
    found = plan(a_layout([GB] * 16), [slow, fast])
    layers = {name: end - first for name, first, end in ranges(found)}
    assert layers == {"fast": 8, "slow": 8}


def layer_counts(found: Plan) -> list[int]:
    return [stage.end - stage.first for stage in found.stages]


@pytest.mark.parametrize("objective", ["latency", "throughput"])
def test_machines_of_a_kind_get_even_cuts(objective: Objective) -> None:
    deepseek = a_layout([GB // 3] * 3 + [6 * GB] * 58, head=2 * GB, active=[GB // 3] * 61)
    two = plan(deepseek, machines(*[280 * GB] * 2), objective)
    assert sorted(layer_counts(two)) == [28, 33]  # the head is read for each token too

    seven = plan(a_layout([GB] * 61), machines(*[11 * GB] * 7), objective)
    assert sorted(layer_counts(seven)) == [8, 8, 9, 9, 9, 9, 9]


def test_twelve_machines_of_a_kind_get_even_cuts() -> None:
    found = plan(a_layout([GB] * 60), machines(*[int(8.8 * GB)] * 12))

    assert sorted(layer_counts(found)) == [7, 7, 7, 7, 8, 8, 8, 8]


def test_a_measured_reason_makes_cuts_uneven() -> None:
    layout = a_layout([GB] * 20)
    alike, slow = machines(14 * GB, 14 * GB)
    noisy = a_machine("m1", 14 * GB, 100 * GB, slowdown=1.005)
    much = a_machine("m1", 14 * GB, 100 * GB, slowdown=1.3)

    assert layer_counts(plan(layout, [alike, slow])) == [10, 10]
    assert layer_counts(plan(layout, [alike, noisy])) == [10, 10]
    assert ranges(plan(layout, [alike, much]))[0] == ("m0", 0, 13)


def test_a_few_per_cent_stay_free_where_that_costs_no_speed() -> None:
    layout = a_layout([GB] * 20)
    full = layout.needed(10 * GB)

    # Ten layers fit each machine to the byte, and a third machine of their kind is a hop more.
    tight = plan(layout, machines(full, full))
    assert [stage.free_bytes for stage in tight.stages] == [0, 0]
    # One of the two may be larger: then the smaller one is not filled.
    roomy = plan(layout, machines(full, full + 2 * GB))
    assert min(stage.free_bytes / stage.machine.usable for stage in roomy.stages) >= 0.03


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
    reading = 4 * GB / (BANDWIDTH_SHARE * 100 * GB)
    assert found.seconds_per_token == pytest.approx(reading + 4 * LAYER_S)


def test_only_the_nodes_asked_for_are_used() -> None:
    found = plan(a_layout([GB] * 8), machines(20 * GB, 20 * GB), nodes=["m1"])
    assert ranges(found) == [("m1", 0, 8)]
    assert found.left_out[0][1] == "not among the requested nodes"


def test_an_unknown_node_is_named_with_those_there() -> None:
    with pytest.raises(InputError, match="no machine named 'mac': there are m0, m1"):
        plan(a_layout([GB]), machines(GB, GB), nodes=["mac"])


def test_a_machine_without_mlx_takes_no_layers() -> None:
    bare = a_machine("bare", 90 * GB, 900e9, engines=())
    found = plan(a_layout([GB] * 8), [bare, *machines(20 * GB)])
    assert ranges(found) == [("m0", 0, 8)]
    assert found.left_out == ((bare, "has no MLX installed"),)


def test_a_machine_of_unknown_bandwidth_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="odd states no memory bandwidth"):
        plan(a_layout([GB]), [a_machine("odd", 9 * GB, 0.0)])


def test_missing_memory_is_counted_and_each_remedy_works() -> None:
    layout = a_layout([6 * GB] * 60, head=GB, quant="q4")
    fleet = machines(100 * GB, 100 * GB, 100 * GB)
    with pytest.raises(NoPlanError) as refused:
        plan(layout, fleet, model="deepseek-r1 q4")
    assert str(refused.value) == (
        "deepseek-r1 q4 with context 8192 for 1 user needs 362.2 GB and the 3 machines offer "
        "300.0 GB: 68.4 GB are missing, in whole layers. One more machine with 72.5 GB usable, "
        "a bosgame-m5-128 ($1700) or --quant q3 would do"
    )
    larger = [replace(fleet[0], usable=fleet[0].usable + refused.value.missing), *fleet[1:]]
    assert len(plan(layout, larger).stages) == 3
    extra = a_machine("extra", int(72.5 * GB), 100e9)
    assert len(plan(layout, [*fleet, extra]).stages) == 4


def test_a_machine_smaller_than_the_one_suggested_would_not_do() -> None:
    layout = a_layout([6 * GB] * 60, head=GB)
    extra = a_machine("extra", int(72.3 * GB), 100e9)
    with pytest.raises(DoesNotFitError):
        plan(layout, [*machines(100 * GB, 100 * GB, 100 * GB), extra])


def test_a_shorter_context_and_fewer_users_are_suggested_when_they_would_do() -> None:
    layout = a_layout([GB] * 10, kv=[GB] * 10, users=4)
    with pytest.raises(DoesNotFitError, match=r"--context 4096 or --users 2 would do$"):
        plan(layout, machines(17 * GB))


def test_layers_too_coarse_for_the_machines_are_not_reported_as_too_little_memory() -> None:
    with pytest.raises(DoesNotFitError) as refused:
        plan(a_layout([10 * GB] * 4), machines(15 * GB, 15 * GB, 19 * GB))
    assert "no cut between layers fits: m2 would need 1.4 GB more." in str(refused.value)


def test_without_machines_the_one_needed_is_reported() -> None:
    with pytest.raises(DoesNotFitError, match=r"no machine.*One more machine with 10\.\d GB"):
        plan(a_layout([GB] * 10), [])


@pytest.mark.sweep
@pytest.mark.parametrize("objective", ["latency", "throughput"])
def test_more_unlike_machines_than_are_searched_exactly_still_fit(objective: Objective) -> None:
    layout = a_layout([3 * GB] * 60, head=2 * GB)
    fleet = [a_machine(f"m{i}", (10 + i % 7) * GB + i, (100 + 17 * i) * 1e9) for i in range(24)]
    found = plan(layout, fleet, objective)
    assert sum(stage.end - stage.first for stage in found.stages) == 60


def test_an_even_split_has_the_smallest_largest_stage() -> None:
    dice = random.Random(5)
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
    with pytest.raises(InputError, match="invalid layout"):
        Layout.from_proto(node_pb2.ModelLayout(model_type="llama", layer_bytes=[1], users=1))


def gguf_of(layout: Layout, tail: int = 0) -> Layout:
    """Layout of a GGUF of these sizes, with the lm_head in the last layer."""
    last = layout.layer_bytes[-1] + tail
    return replace(
        layout,
        layer_bytes=(*layout.layer_bytes[:-1], last),
        layer_active_bytes=(*layout.layer_active_bytes[:-1], last),
        head_bytes=layout.head_bytes - tail,
        engine="ggml",
        lm_head_bytes=tail,
        hidden_size=layout.hidden_size,
    )


STUDIO = a_machine("studio", 12 * GB, 800e9)
BOX = a_machine("box", 12 * GB, 128e9, backend="cpu", ggml_backend="vulkan", ggml_bandwidth=256e9)


def test_each_stage_has_the_engine_that_is_faster_there() -> None:
    layout = a_layout([GB] * 16, head=2 * GB)

    found = plan(ModelVariants(layout, gguf_of(layout, GB)), [BOX, STUDIO])

    assert [(s.machine.name, s.engine, s.has_lm_head) for s in found.stages] == [
        ("studio", "mlx", False),
        ("box", "ggml", False),
    ]
    assert sum(s.weight_bytes for s in found.stages) == layout.weight_bytes


def test_a_ring_whose_head_is_of_ggml_is_all_of_it() -> None:
    layout = a_layout([GB] * 16, head=2 * GB)
    boxes = [replace(BOX, name=name) for name in ("box-1", "box-2")]

    found = plan(ModelVariants(layout, gguf_of(layout, GB)), boxes)

    assert found.engines == ("ggml",)
    assert [s.has_lm_head for s in found.stages] == [False, True]
    assert sum(s.weight_bytes for s in found.stages) == layout.weight_bytes


def test_behind_a_head_of_ggml_the_last_stage_makes_the_logits() -> None:
    layout = replace(a_layout([GB] * 16, head=2 * GB), added_lm_head_bytes=GB)
    variants = ModelVariants(layout, gguf_of(layout, GB))
    box = replace(BOX.only(["ggml"]), usable=layout.needed(17 * GB))
    # No place for the embedding, the lm_head and a layer, as an MLX head would have to have.
    mini = replace(STUDIO.only(["mlx"]), name="mini", usable=layout.needed(5 * GB // 2))

    found = plan(variants, [mini, box])

    assert [(s.machine.name, s.first, s.engine, s.has_lm_head) for s in found.stages] == [
        ("box", 0, "ggml", False),
        ("mini", 15, "mlx", True),
    ]
    assert sum(s.weight_bytes for s in found.stages) == layout.weight_bytes
    with pytest.raises(NoPlanError):
        plan(ModelVariants(replace(layout, added_lm_head_bytes=0), variants.gguf), [mini, box])


def test_logits_that_come_back_take_their_time() -> None:
    layout = replace(gguf_of(a_layout([GB] * 16, head=2 * GB), GB), vocabulary=125_000)
    boxes = [replace(BOX, name=name, link="1gbe") for name in ("box-1", "box-2")]

    there, back = (stage.hop_s for stage in plan(layout, boxes).stages)

    assert back - there == pytest.approx((4 * 125_000 - layout.hidden_bytes) / 125e6)


def test_where_engines_are_alike_it_is_mlx() -> None:
    layout = a_layout([GB] * 16, head=2 * GB)
    alike = [replace(STUDIO, name=name) for name in ("one", "two")]

    assert plan(ModelVariants(layout, gguf_of(layout, GB)), alike).engines == ("mlx",)


def test_on_a_cpu_ggml_is_taken_for_faster() -> None:
    layout = a_layout([GB] * 4, quant="q4")
    plain = a_machine("plain", 12 * GB, 40e9, backend="cpu", ggml_backend="cpu")

    found = plan(ModelVariants(layout, gguf_of(layout)), [plain])

    assert found.engines == ("ggml",)
    assert found.seconds_per_token < plan(layout, [plain]).seconds_per_token / 10


def test_a_gpu_differs_from_a_cpu_with_the_same_memory() -> None:
    layout = a_layout([GB] * 4, quant="q4")
    cpu = a_machine("cpu", 12 * GB, 100e9, backend="cpu")
    gpu = a_machine("gpu", 12 * GB, 100e9, backend="metal")

    found = plan(layout, [cpu, gpu])

    assert ranges(found) == [("gpu", 0, 4)]


def test_a_machine_with_ggml_alone_is_left_out_with_the_reason() -> None:
    alone = BOX.only(["ggml"])

    found = plan(a_layout([GB] * 4), [STUDIO, alone])

    assert found.left_out[0][1] == (
        "offers only ggml (llama.cpp), and the model is no GGUF: give it one with --gguf"
    )


def test_a_model_that_only_both_engines_can_hold_fits() -> None:
    layout = a_layout([GB] * 16, head=GB)
    variants = ModelVariants(layout, gguf_of(layout))
    fleet = [STUDIO.only(["mlx"]), BOX.only(["ggml"])]

    assert plan(variants, fleet).engines == ("mlx", "ggml")
    with pytest.raises(NoPlanError):
        plan(layout, fleet)
    with pytest.raises(NoPlanError, match=r"are missing.*One more machine with [\d.]+ GB usable"):
        plan(variants, [replace(machine, usable=8 * GB) for machine in fleet])


def test_a_gguf_of_another_model_is_refused_by_what_differs() -> None:
    layout = replace(a_layout([GB] * 4), hidden_size=64)
    gguf = replace(gguf_of(layout), hidden_size=64)
    names = ("mine", "other.gguf")
    check_same(layout, gguf, names)

    with pytest.raises(InputError, match="it has 5 layers, and mine 4"):
        check_same(layout, replace(gguf_of(a_layout([GB] * 5)), hidden_size=64), names)
    with pytest.raises(InputError, match="it has 128 numbers in a hidden state, and mine 64"):
        check_same(layout, replace(gguf, hidden_size=128), names)
    with pytest.raises(InputError, match=r"other\.gguf: it is no GGUF"):
        check_same(layout, layout, names)
    with pytest.raises(InputError, match="mine is a GGUF itself"):
        check_same(gguf, gguf, names)
    with pytest.raises(InputError, match="hand on more than a hidden state"):
        check_same(replace(layout, hidden_size=0), gguf, names)


@pytest.mark.parametrize(("objective", "odd"), [("latency", {6}), ("throughput", {4, 5})])
def test_forbidden_counts_are_not_used(objective: Objective, odd: set[int]) -> None:
    layout = replace(a_layout([GB] * 12), forbidden_counts=(*odd, 12))
    free = plan(replace(layout, forbidden_counts=()), machines(*[9 * GB] * 3), objective)

    found = plan(layout, machines(*[9 * GB] * 3), objective)

    counts = [stage.end - stage.first for stage in found.stages]
    assert sum(counts) == 12
    assert not set(counts) & odd
    assert {stage.end - stage.first for stage in free.stages} & odd
    assert len(plan(layout, machines(20 * GB)).stages) == 1  # all of them are no stage of so many


def test_what_fits_only_by_a_forbidden_count_is_refused() -> None:
    layout = replace(a_layout([GB] * 4), forbidden_counts=(2,))
    with pytest.raises(InputError, match=r"llama\.cpp takes for another model"):
        plan(layout, machines(3 * GB, 3 * GB))


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
