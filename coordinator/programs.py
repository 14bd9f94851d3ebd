"""The programs of `node` that a coordinator runs as processes of their own.

They are named here and nowhere else, because the coordinator never imports `node`: MLX stays in
the child.
"""

INSPECT = "node.inspect"
BASELINE = "node.worker.baseline"
