"""Foundation models by URI, behind one small protocol.

`synclip`           the embedded default at input size 160; `synclip:260` for native resolutions
`openclip:A/TAG`    open_clip architecture A with the hub's weights TAG (needs network once)
`openclip:A//path`  the same with a checkpoint on disk
"""

from .base import FoundationModel, build_pool, load_foundation_model

__all__ = ["FoundationModel", "build_pool", "load_foundation_model"]
