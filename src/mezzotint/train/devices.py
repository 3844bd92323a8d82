"""Accelerators as their makers rate them, and what renting one costs."""

from dataclasses import dataclass

GPUS_PER_NODE = 8


@dataclass(frozen=True)
class Device:
    """memory: bytes that programs see. bf16, float32: operations a second of dense products. bandwidth: bytes a second of its memory.

    link, network: bytes a second that one sends to others of its node, and to those of other nodes. host: bytes a second that come from the
    CPU's memory. price: dollars an hour.
    """

    memory: float
    bf16: float
    float32: float
    bandwidth: float
    link: float
    network: float
    host: float
    price: float


# Rates are those of the makers' data sheets, for dense products, without sparsity. Prices are about what clouds asked for one hour on
# demand in 2025; neither they nor the networks (400, 200 or 25 Gbit/s an accelerator) were verified, and --price sets another.
DEVICES: dict[str, Device] = {
    "a100-40": Device(39.5 * 2**30, 312e12, 19.5e12, 1.555e12, 300e9, 25e9, 32e9, 1.3),
    "a100": Device(79.2 * 2**30, 312e12, 19.5e12, 2.039e12, 300e9, 25e9, 32e9, 1.8),
    "h100": Device(79.6 * 2**30, 989e12, 67e12, 3.35e12, 450e9, 50e9, 64e9, 3.0),
    "h200": Device(139.8 * 2**30, 989e12, 67e12, 4.8e12, 450e9, 50e9, 64e9, 3.8),
    "b200": Device(178.0 * 2**30, 2250e12, 75e12, 8.0e12, 900e9, 50e9, 64e9, 5.5),
    "l40s": Device(44.5 * 2**30, 362e12, 91.6e12, 0.864e12, 25e9, 3e9, 32e9, 1.0),
    "rtx4090": Device(23.6 * 2**30, 165e12, 82.6e12, 1.008e12, 25e9, 3e9, 32e9, 0.5),
}
