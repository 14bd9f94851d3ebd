"""Memory bandwidth of known chips, as their makers state it, in bytes per second."""

import re

GB = 1e9

# Apple's technical specifications of the Macs, by GPU cores where they differ (0: any).
_APPLE: dict[str, dict[int, float]] = {
    "M1": {0: 68.25},
    "M1 Pro": {0: 200},
    "M1 Max": {0: 400},
    "M1 Ultra": {0: 800},
    "M2": {0: 100},
    "M2 Pro": {0: 200},
    "M2 Max": {0: 400},
    "M2 Ultra": {0: 800},
    "M3": {0: 100},
    "M3 Pro": {0: 150},
    "M3 Max": {30: 300, 40: 400},
    "M3 Ultra": {0: 819},
    "M4": {0: 120},
    "M4 Pro": {0: 273},
    "M4 Max": {32: 410, 40: 546},
    "M5": {0: 153},
    "M5 Pro": {0: 307},
    "M5 Max": {32: 460, 40: 614},
}

_OTHERS: dict[str, float] = {
    # AMD's product pages: all of Strix Halo has 256 bits of LPDDR5X-8000.
    r"(AMD )?Ryzen AI Max\+? .*": 256,
    # The GPU of Strix Halo, as its drivers call it.
    r"(AMD )?Radeon 80[56]0S( Graphics)?": 256,
    # AMD's product pages of desktop cards.
    r"(AMD )?Radeon RX 6800( XT)?": 512,
    r"(AMD )?Radeon RX 6900 XT": 512,
    r"(AMD )?Radeon RX 7900 XT": 800,
    r"(AMD )?Radeon RX 7900 XTX": 960,
    r"(AMD )?Radeon RX 9070( XT)?": 640,
    r"(AMD )?Radeon PRO W7900": 864,
    # Intel's product pages.
    r"(Intel )?Arc A770( Graphics)?": 560,
    r"(Intel )?Arc B580( Graphics)?": 456,
    # NVIDIA's user guides of DGX Spark and of the Jetson modules.
    r"(NVIDIA )?GB10": 273,
    r"(NVIDIA )?(Jetson AGX )?Thor": 273,
    r"(NVIDIA )?(Jetson AGX )?Orin": 205,
    # NVIDIA's specifications of desktop cards. Laptop parts of the same number are slower.
    r"(NVIDIA )?(GeForce )?RTX 3090": 936,
    r"(NVIDIA )?(GeForce )?RTX 3090 Ti": 1008,
    r"(NVIDIA )?(GeForce )?RTX 4080": 717,
    r"(NVIDIA )?(GeForce )?RTX 4080 SUPER": 736,
    r"(NVIDIA )?(GeForce )?RTX 4090": 1008,
    r"(NVIDIA )?(GeForce )?RTX 5070 Ti": 896,
    r"(NVIDIA )?(GeForce )?RTX 5080": 960,
    r"(NVIDIA )?(GeForce )?RTX 5090": 1792,
    r"(NVIDIA )?RTX 6000 Ada Generation": 960,
    # NVIDIA's data sheets of cards for servers.
    r"(NVIDIA )?A100.*80GB": 2039,
    r"(NVIDIA )?H100 80GB HBM3": 3350,
    r"(NVIDIA )?H200": 4800,
}


def known_bandwidth(chip: str, gpu_cores: int = 0) -> float | None:
    """Bytes per second, or None for a chip that is not in the table.

    `gpu_cores` tells the variants of a chip apart. Where it is not known (0), the slowest
    counts: a plan should not promise more than the machine gives.
    """
    if variants := _APPLE.get(chip.removeprefix("Apple ")):
        return variants.get(gpu_cores, min(variants.values())) * GB
    # Drivers add marks, and in brackets their name and that of the architecture.
    plain = re.sub(r"\((R|TM)\)", "", chip, flags=re.IGNORECASE)
    plain = re.sub(r"\s*\([^()]*\)$", "", plain).strip()
    for pattern, bandwidth in _OTHERS.items():
        if re.fullmatch(pattern, plain, re.IGNORECASE):
            return bandwidth * GB
    return None
