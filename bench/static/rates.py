"""Rates of one multiprocessor, per architecture: how long each kind of instruction holds its pipe.

Cycles are those of one of the four sub-partitions of a multiprocessor for one instruction of a warp (32 lanes): lanes per cycle and
multiprocessor in the vendor's tables, times 32 / 4. Sources, by the letters in the comments:
[P] CUDA C++ Programming Guide, "Arithmetic Instructions", throughput of native arithmetic instructions;
[A] NVIDIA A100 Tensor Core GPU Architecture; [H] NVIDIA H100 Tensor Core GPU Architecture; [B] NVIDIA Blackwell Architecture Technical Brief;
[M] microbenchmarks: arXiv:2402.13499 (Hopper), arXiv:2208.11174 (Ampere). Reported L2 rates differ by a factor of two, so no goal that is asserted
uses them.
"""

import dataclasses
import re


def _set(names: str) -> set[str]:
    return set(names.split())


# Instructions by pipe. What is in none of these sets counts as one cycle of issue and nothing else.
FMA = _set("FFMA FADD FMUL FFMA32I FSWZADD HFMA2 HADD2 HMUL2 FFMA2 FADD2 FMUL2 IMAD IMAD32I DFMA DADD DMUL")
ALU = _set(
    "IADD3 IADD LOP3 SHF SEL FSEL FMNMX FMNMX3 ISETP FSETP PRMT LEA IMNMX VIMNMX VIMNMX3 PLOP3 FSET MOV I2FP F2FP IABS VIADD VIADDMNMX "
    "BMSK SGXT LOP P2R R2P FCHK HMNMX2 HSETP2 IDP CS2R"
)
XU = _set("MUFU F2F F2I I2F FRND POPC FLO BREV")
SHARED_MEMORY = _set("LDS STS ATOMS LDSM STSM SHFL REDUX")
LOADS, STORES = _set("LDG LD LDGSTS"), _set("STG ST")
LOCAL = _set("LDL STL")
ATOMICS = _set("RED REDG ATOM ATOMG")
TENSOR = re.compile(r"(HMMA|[HQBI]GMMA|UTC\w*MMA)\b")


@dataclasses.dataclass(frozen=True)
class Rates:
    """One architecture's usual part."""

    name: str
    multiprocessors: int
    ghz: float  # boost clock; with `tensor_flops` it gives the dense 16-bit peak of the vendor's page
    tensor_flops: int  # dense 16-bit FLOPs per cycle and multiprocessor
    hmma: float  # cycles of HMMA.16816 (4096 FLOPs a warp)
    fp32: int  # cycles of an FP32 instruction
    dram: float  # TB/s
    l2: float  # TB/s, reads that hit
    shared: int  # bytes of shared memory of a multiprocessor
    mufu: int = 8  # [P] 16 lanes per cycle, all three architectures
    alu: int = 2  # [P] 64 lanes per cycle: compare, minimum, add, shift, logic, conversion between FP32 and 16 bits
    warps: int = 64  # [P] "Compute Capabilities": resident warps
    blocks: int = 32  # resident blocks
    registers: int = 65536

    def per_cycle(self, terabytes: float) -> float:
        """Bytes per cycle and sub-partition of a rate of the whole part."""
        return terabytes * 1e12 / (self.multiprocessors * 4 * self.ghz * 1e9)


RATES = {
    # [A] 108 SMs, 1410 MHz, 312 TFLOP/s dense, 2039 GB/s (80 GB), 164 KB; [P] 64 FP32 lanes; [M] L2 reads
    80: Rates("A100", 108, 1.41, 2048, 8.0, 2, 2.039, 4.0, 164 << 10),
    # [H] 132 SMs, 989.4 TFLOP/s dense at 1830 MHz, 3.35 TB/s, 228 KB; [P] 128 FP32 lanes; [M] HMMA reaches 62 % of wgmma; [M] L2 reads
    90: Rates("H100 SXM", 132, 1.83, 4096, 6.4, 1, 3.35, 5.5, 228 << 10),
    # [B] 148 SMs, 2250 TFLOP/s dense, 8 TB/s, 228 KB; [P] 128 FP32 lanes; the L2 rate is scaled from H100 by DRAM and is a guess
    100: Rates("B200", 148, 1.85, 8192, 6.4, 1, 8.0, 10.0, 228 << 10),
}


def pipe(op: str, args: str, rates: Rates) -> tuple[str, float, int]:
    """(pipe, cycles that it is held, latency until a dependent instruction may start) of one instruction of a warp.

    Latencies are [M], Hopper's; they only enter the replay (class C). Asynchronous copies (UTMALDG, LDGSTS) take issue and MIO cycles only:
    what they move is counted against the L2 by bench/static/model.py.
    """
    base = op.split(".")[0]
    if TENSOR.match(op):
        if base == "HMMA":
            flops = 1 if ".16816." in op else 0.5
            return "tensor", rates.hmma * flops, 33
        shape = re.search(r"64x(\d+)x", op)
        if shape is None:  # tcgen05: one thread asks for a whole tile, whose size is in a descriptor
            return "tensor", 0, 30
        # [M] wgmma reads its shared operands at 128 B a cycle: N / 4 for B, and 16 more when A (64 x 16) is in shared memory too.
        from_registers = re.match(r"R\d+(\.\w+)?, R\d+", args)
        n = int(shape[1])
        return "tensor", max(n / 2, n / 4 + (0 if from_registers else 16)), 30
    if base in FMA:
        return "fma", 2 if base in ("FFMA2", "FADD2", "FMUL2") else rates.fp32, 4
    if base in ALU:
        return "alu", rates.alu, 6
    if base in XU:
        return "xu", rates.mufu, 22
    width = 16 if ".128" in op else 8 if ".64" in op else 4
    if base in ("LDSM", "STSM"):
        return "mio", 16 if ".4" in op else 8 if ".2" in op else 4, 33
    if base in SHARED_MEMORY:
        return "mio", 8 if base == "REDUX" else 4 if base == "SHFL" else width, 24 if base == "SHFL" else 29
    if base in LOADS | STORES | LOCAL | ATOMICS:  # [P] 128 bytes a cycle and multiprocessor
        return "mio", width, 33 if base in LOCAL else 20
    if base in ("BAR", "BRA", "WARPGROUP", "WARPSYNC", "BSSY", "BSYNC", "SYNCS"):
        return "control", 0, 15
    return "other", 0, 20 if base in ("LDC", "LDCU", "S2R", "S2UR", "R2UR", "ULDC", "LDTM", "STTM") else 6
