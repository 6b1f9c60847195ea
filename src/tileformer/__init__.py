"""tileformer: fused Triton kernels for Transformer training and inference, with a thin PyTorch encoder-decoder on top.

Rooms, each of which imports only those before it:

    tileformer.kernels    attention, layer_norm, softmax, cross_entropy, dropout, and what they are defined to compute
    tileformer.decoder    torch.nn's Transformer classes on those kernels, a sequence-to-sequence model, decoding
    tileformer.training   data, optimiser, the step loop, checkpoints, recipes
    tileformer.bench      timing, and checking every op on the machine at hand

Importing this package, or any room, starts no GPU driver.
"""

import os

__version__ = "0.2.0.dev0"

_here = os.path.dirname(os.path.abspath(__file__))
if not os.path.isdir(os.path.join(_here, "kernels")):
    # The links to the rooms were lost in copying (an archive or a file system without them): look in the root.
    __path__.append(os.path.dirname(os.path.dirname(_here)))
