"""Programs that read text in images: convolutions along the line, then recurrent layers."""

import torch

from programs.audio import HUB, LIBROSA, REQUESTS
from programs.harness import program, skip_init

WIDTHS = ((2, 64), (1, 64), (3, 64), (2, 100), (2, 48))  # rows and pixels
VISION = "torchvision==0.28.0"
DOCTR = (
    *("python-doctr==1.1.0", "anyascii==0.3.3", "langdetect==1.0.9", "opencv-python-headless==5.0.0.93"),
    *("pyclipper==1.4.0", "pypdfium2==5.15.2", "rapidfuzz==3.14.6", "shapely==2.2.0", "validators==0.36.0"),
    *HUB,
    *REQUESTS,
    VISION,
)
KRAKEN = (
    *(
        "kraken==7.1.1",
        "cattrs==26.2.1",
        "coremltools==9.0",
        "iso639-lang==2.6.3",
        "lxml==6.1.3",
        "pytz",
        "regex==2026.11.19",
    ),
    *("scikit-image==0.26.0", "shapely==2.2.0", "sentencepiece==0.2.3", "torchaudio==2.11.1", VISION),
    *LIBROSA,
    *HUB,
    *REQUESTS,
)


@program("easyocr: Model", "easyocr==1.7.2", VISION, sizes=WIDTHS, served=2)
def easyocr():
    skip_init("easyocr")
    from easyocr.model.model import Model

    module = Model(input_channel=1, output_channel=64, hidden_size=32, num_class=40)
    return module, lambda rows, width: (torch.randn(rows, 1, 64, width), torch.zeros(rows, 1, dtype=torch.long))


@program("easyocr: VGG model", "easyocr==1.7.2", VISION, sizes=WIDTHS, served=2)
def easyocr_vgg():
    skip_init("easyocr")
    from easyocr.model.vgg_model import Model

    module = Model(input_channel=1, output_channel=64, hidden_size=32, num_class=40)
    return module, lambda rows, width: (torch.randn(rows, 1, 64, width), torch.zeros(rows, 1, dtype=torch.long))


@program("doctr: CRNN", *DOCTR, sizes=WIDTHS, trains=False)
def doctr():
    from doctr.models.recognition import crnn_mobilenet_v3_small

    module = crnn_mobilenet_v3_small(pretrained=False, pretrained_backbone=False, exportable=True)
    return module, lambda rows, width: (torch.rand(rows, 3, 32, width),)


@program("kraken: TransposedSummarizingRNN", *KRAKEN, sizes=WIDTHS)
def kraken():
    from kraken.lib.vgsl.layers import TransposedSummarizingRNN

    module = TransposedSummarizingRNN(16, 32, "b", transpose=False, summarize=False)
    return module, lambda rows, width: (torch.randn(rows, 16, 1, width),)


@program("kraken: TransposedSummarizingRNN, summary", *KRAKEN, sizes=WIDTHS, runtime=True)
def kraken_summary():
    from kraken.lib.vgsl.layers import TransposedSummarizingRNN

    module = TransposedSummarizingRNN(16, 32, "f", transpose=True, summarize=True)
    return module, lambda rows, width: (torch.randn(rows, 16, 12, width),)
