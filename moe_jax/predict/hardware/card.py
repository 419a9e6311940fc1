"""A card, its links, and the text by which XLA knows it."""

from collections.abc import Mapping
from dataclasses import dataclass

UNMEASURED_GEMM = 0.8
"""Share of the data sheet's rate that a large product reaches where none was measured. H100, A100
and B200 reach 0.80, 0.87 and 0.78 (cards.toml)."""
MEMORY_SHARE = 0.9
"""Share of the memory's peak that a kernel reaches which only moves bytes. It is an assumption."""


@dataclass(frozen=True)
class Link:
    """A way from a device to others. Rates are those of one device in one direction."""

    name: str
    peak: float
    """Bytes a second on the data sheet."""
    rate: float
    """Bytes a second of large collectives, as measured."""
    hop: float
    """Seconds of one step of a ring."""
    tree_hop: float
    """Seconds of one step of a tree."""
    source: str = ""


@dataclass(frozen=True)
class Card:
    """A kind of GPU, and how GPUs of this kind are connected."""

    name: str
    description: str
    """As the driver names it."""
    sources: tuple[str, ...]
    capability: float
    """The compute capability."""
    peak_flops: float
    """FLOP/s of bfloat16 products on the data sheet, of float32 where there are none. MFU is a
    share of it."""
    node: int
    """Devices that `link` connects."""
    link: Link
    """Between devices of a node."""
    network: Link
    """Between nodes."""
    host_link: Link
    """To the host's memory."""
    xla: Mapping[str, float]
    """Fields of XLA's gpu_device_info."""
    gemm_flops: float = 0.0
    """FLOP/s of the largest product that was measured. 0: none was."""
    peak_fp8_flops: float = 0.0
    """0: no FP8."""
    gemm_fp8_flops: float = 0.0

    @property
    def arch(self) -> int:
        """The compute capability times ten."""
        return round(10 * self.capability)

    @property
    def memory_bytes(self) -> int:
        """Bytes of memory, all of it."""
        return int(self.xla["device_memory_size"])

    @property
    def memory_rate(self) -> float:
        """Bytes a second of a kernel that only moves bytes."""
        return MEMORY_SHARE * self.xla["memory_bandwidth"]

    @property
    def product_rate(self) -> float:
        """FLOP/s of a large bfloat16 product: measured, or a share of the data sheet's."""
        return self.gemm_flops or UNMEASURED_GEMM * self.peak_flops

    @property
    def fp8_rate(self) -> float:
        """product_rate for FP8. Without FP8 it is product_rate."""
        return self.gemm_fp8_flops or UNMEASURED_GEMM * self.peak_fp8_flops or self.product_rate

    @property
    def target(self) -> str:
        """XLA's description of the card, a GpuTargetConfigProto."""
        major, minor = divmod(self.arch, 10)
        fields = " ".join(f"{name}: {value}" for name, value in self.xla.items())
        return (
            f"gpu_device_info {{ {fields} "
            f"cuda_compute_capability {{ major: {major} minor: {minor} }} }}\n"
            'platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 }\n'
            f'device_description_str: "{self.description}"\n'
        )
