"""Stages computed by llama.cpp's library on layers of a GGUF: a second engine beside MLX."""
