"""The host-free half of asdm: names, architectures, surgery, files and measurements.

Needs torch, numpy, einops and safetensors. Never imports ComfyUI or diffusers; whoever calls
hands in the classes and layers of the host it lives in.
"""

__version__ = "0.1.0"
