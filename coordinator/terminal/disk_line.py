"""Room on disks that stages of a plan take, in a phrase."""

from coordinator.planning.engines import ENGINES
from coordinator.planning.placement import Plan
from unicluster.units import format_bytes


def disk_line(plan: Plan) -> str:
    """Bytes of each stage's own file, which llama.cpp loads; empty where there are none: MLX reads
    the model's files, and so does llama.cpp that has all of a GGUF.
    """
    if len(plan.stages) == 1:
        return ""
    files = [
        f"{stage.machine.name} {format_bytes(stage.weight_bytes)}"
        for stage in plan.stages
        if ENGINES[stage.engine].reads_gguf
    ]
    if not files:
        return ""
    return f"{', '.join(files)} for stages, beside the model's files; hardly any on btrfs, XFS"
