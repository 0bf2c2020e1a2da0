"""Networks for other programs: ``.onnx`` files and archives of ``torch.export`` (``.pt2``)."""

from fastperc.exporting.network import INPUTS, Images
from fastperc.exporting.writing import SUFFIXES, Written, check_format, report, write

__all__ = ["INPUTS", "SUFFIXES", "Images", "Written", "check_format", "report", "write"]
