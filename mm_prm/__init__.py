"""mm-prm: multimodal process reward models on the Hugging Face stack.

Heavy packages load where they are used: `import mm_prm` stays under a second, `import mm_prm.models` registers the
process-reward classes with transformers.
"""

import os

# Whether there is a GPU is asked of the driver: after any other question CUDA cannot be used in a process that is forked
# later, such as vLLM's engine.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

__version__ = "0.1.0"
