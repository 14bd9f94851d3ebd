"""Which stages are equal, so that the worker of one can serve as the other's."""

from typing import Any

from unicluster.v1.node_pb2 import StageSpec

# What may differ: how a stage is called, where its files are, and what was planned of it. All other
# fields matter, and so will those to come.
_IRRELEVANT = (
    *("deployment", "sources", "hub_files", "memory", "orphan_grace_s", "coordinator"),
    *("decode_s", "prefill_s", "ring_decode_s", "ring_prefill_s"),
)


def stage_key(spec: StageSpec) -> bytes:
    """Equal for two stages where a worker that has loaded one is the other as well.

    That is: of one service, model, revision and range, with the same options on the same devices.
    """
    relevant: Any = StageSpec()  # whose stubs take names of fields as literals only
    relevant.CopyFrom(spec)
    for field in _IRRELEVANT:
        relevant.ClearField(field)
    if spec.HasField("draft"):
        relevant.draft.ClearField("hub_files")
    for share in relevant.devices:
        share.ClearField("memory")
    if spec.first_layer:
        relevant.ClearField("kv_bytes")  # read by the head, for the caches of all stages
    serialized: bytes = relevant.SerializeToString(deterministic=True)
    return serialized
