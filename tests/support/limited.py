"""The inspecting child with smaller limits: `python -m tests.support.limited`."""

from node.inspect import __main__ as inspecting

inspecting.CPU_SECONDS = 20
inspecting.DATA_BYTES = 512 << 20

if __name__ == "__main__":
    inspecting.main()
