"""The canvas: a second embedded world, of things in six artists' hands, and a Stable Diffusion trained on it.

`concepts` and `captions` say what there is and how it is called, `tokenizer` has CLIP's own merges, `quality` measures
the weights in `weights/`. What makes them is not installed: tools/canvas of the repository. NOTICE names the artists'
sets and their licences.
"""

import pathlib

WEIGHTS = pathlib.Path(__file__).parent / "weights"  # what load_pipeline("canvas") reads
