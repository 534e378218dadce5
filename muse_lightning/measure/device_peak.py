"""Peak speed of known devices: what MFU is a fraction of."""

# Dense bf16 and fp16 matrix products with float32 sums, FLOP/s, by a part of the name the driver gives; the first match
# counts. From NVIDIA's data sheets, whose figures "with sparsity" are twice these. Own table because Lightning's lists
# the sparse figures for H100 NVL and H200.
_PEAKS = (
    ("B200", 2250e12),  # HGX B200: 36 PFLOP/s sparse for eight
    ("GH200", 989e12),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("H100 NVL", 835e12),
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
)


def half_precision_peak(device_name: str) -> float | None:
    """Peak FLOP/s of a GPU in bf16 or fp16, without sparsity; None if it is not known.

    Args:
        device_name: as `torch.cuda.get_device_name` gives it.
    """
    return next((peak for name, peak in _PEAKS if name in device_name), None)
