"""What a machine may be compared with: the documented tables, and the floor of its card."""

from __future__ import annotations

from qwen2_npu.conformance.machine.fingerprint import Fingerprint
from qwen2_npu.conformance.machine.hardware import HARDWARE, Hardware
from qwen2_npu.conformance.machine.verified import Where

DOCUMENTED_FAMILY = "Ascend910B"
"""The guide says Atlas 800I A2 and no SKU: any card of the family counts."""


def not_comparable(fingerprint: Fingerprint, machine: str) -> str | None:
    """Why documented numbers of ``machine`` say nothing about this one; None where they do."""
    identity = fingerprint.identity
    product = identity.get("product")
    matches = (
        identity.get("device") == "npu"
        and fingerprint.where is Where.NPU
        and str(identity.get("soc") or "").startswith(DOCUMENTED_FAMILY)
        and identity.get("machine") in ("aarch64", "arm64")
        and ("Atlas" not in str(product) or machine in str(product))
    )
    if matches:
        return None
    here = [str(identity.get("verified")), str(identity.get("machine")), *([str(product)] if product else [])]
    return f"not comparable: needs an {machine} (this is {', '.join(here)})"


def card_of(fingerprint: Fingerprint) -> tuple[Hardware | None, str]:
    """The card whose floor binds here, else None and why that is a gap (empty where no floor is to be expected)."""
    identity = fingerprint.identity
    soc = str(identity.get("soc"))
    if identity.get("device") == "cpu":
        return None, ""
    if soc in HARDWARE:
        return HARDWARE[soc], ""
    return None, f"nothing is known of {soc}: add its bandwidth and peak to qwen2_npu/conformance/machine/hardware.py"
