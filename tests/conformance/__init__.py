"""Checkpoints and answers written by the libraries that publish SAEs, for our loaders to be checked against.

One module for each library, run in an environment that has it: `python -m tests.conformance.sae_lens OUT`. It builds
small SAEs with that library's classes, saves them with its save functions in the layout of its published releases, and
computes with its forward pass. `tests/sae_models/fixtures/` holds the result; `python -m tests.conformance` (`make
conformance`) installs every library anew, writes everything again and compares.

Nothing here may import the project, or anything but torch, numpy, safetensors, yaml and the library at hand.
"""
