"""Programs that process sound."""

import torch

from programs.harness import program

AUDIO = "torchaudio==2.11.1"


@program("openunmix: OpenUnmix", "openunmix==1.3.0", AUDIO, refused="expected a tensor with 1 to 3 axes")
def open_unmix():
    from openunmix.model import OpenUnmix

    module = OpenUnmix(nb_bins=65, nb_channels=2, hidden_size=32, max_bin=40)
    return module, lambda rows, steps: (torch.rand(rows, 2, 65, steps),)
