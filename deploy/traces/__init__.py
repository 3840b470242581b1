"""Bandwidth traces: when a link may deliver, recorded in one of three formats or made from a seed."""

from .made import LTE_DOWN, LTE_UP, LinkState, constant_trace, synthetic_trace
from .mahimahi import read_mahimahi, write_mahimahi
from .pensieve import read_pensieve, write_pensieve
from .reading import FORMATS, TraceFormat, downlink_beside, open_trace, read_trace
from .statistics import TraceSummary, outages, summarize_trace
from .table import CsvOptions, read_csv
from .trace import MOST_OPPORTUNITIES, PACKET_BYTES, PACKET_MBIT, Trace, with_outage

__all__ = [
    "FORMATS",
    "LTE_DOWN",
    "LTE_UP",
    "MOST_OPPORTUNITIES",
    "PACKET_BYTES",
    "PACKET_MBIT",
    "CsvOptions",
    "LinkState",
    "Trace",
    "TraceFormat",
    "TraceSummary",
    "constant_trace",
    "downlink_beside",
    "open_trace",
    "outages",
    "read_csv",
    "read_mahimahi",
    "read_pensieve",
    "read_trace",
    "summarize_trace",
    "synthetic_trace",
    "with_outage",
    "write_mahimahi",
    "write_pensieve",
]
