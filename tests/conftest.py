"""What holds for all tests."""

import os

# Stages share this machine, and llama.cpp's threads wait for one another without sleeping.
os.environ.setdefault("UNICLUSTER_GGML_THREADS", "1")
