"""mm-prm: multimodal process reward models on the Hugging Face stack.

Heavy packages load where they are used: `import mm_prm` stays under a second, `import mm_prm.models` registers the
process-reward classes with transformers.
"""

__version__ = "0.1.0"
