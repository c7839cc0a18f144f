"""Programs that process sound."""

import torch

from programs.harness import program, skip_init

AUDIO = "torchaudio==2.11.1"
REQUESTS = ("requests==2.34.2", "urllib3==2.8.0", "certifi", "charset_normalizer==3.5.3", "idna")
HUB = (
    "huggingface_hub==2.4.0",
    "httpx2==2.16.2",
    "httpcore2==2.16.2",
    "h11==0.16.0",
    "anyio==4.16.0",
    "truststore==0.10.5",
)
SOUND = ("soundfile==0.14.0", "cffi==2.1.1", "pycparser")
LIBROSA = ("librosa==0.11.0", "lazy_loader==0.6", "audioread==3.1.0", "soxr==1.1.0", "pooch", "decorator")
OPENTELEMETRY = (
    *(f"opentelemetry-{part}==1.45.2" for part in ("api", "sdk", "proto")),
    *(f"opentelemetry-exporter-otlp-proto-{part}==1.45.2" for part in ("common", "http")),
    *(
        f"opentelemetry-{part}==0.66b2"
        for part in ("semantic-conventions", "exporter-http-transport", "exporter-otlp-common")
    ),
    "googleapis-common-protos",
)
AUGMENTATIONS = ("torch_audiomentations==0.12.0", "torch_pitch_shift==1.2.5", "primePy==1.3", "julius==0.2.8")
ENCODEC = ("encodec==0.1.1", AUDIO)
ASTEROID = ("asteroid==0.7.0", "asteroid-filterbanks==0.4.0", *SOUND, *AUGMENTATIONS, *HUB, *REQUESTS, AUDIO)
SPEECHBRAIN = (
    "speechbrain==1.1.2",
    "hyperpyyaml==1.2.3",
    "ruamel.yaml==0.19.1",
    "sentencepiece==0.2.3",
    *HUB,
    *REQUESTS,
    AUDIO,
)
TTS = ("coqui-tts==0.28.0", "coqpit-config==0.2.5", "coqui-tts-trainer==0.4.0", *LIBROSA, *SOUND, *REQUESTS, AUDIO)
WAVES = ((2, 4000), (1, 4000), (3, 4000), (2, 4800), (2, 3200))  # rows and samples
LENGTHS = ((3, 20), (1, 20), (4, 20), (3, 33), (3, 7))


def lengths(rows: int, steps: int) -> torch.Tensor:
    """Return lengths for a batch of sequences, longest first."""
    return torch.tensor([max(1, steps - 3 * row) for row in range(rows)])


@program("openunmix: OpenUnmix", "openunmix==1.3.0", "asteroid-filterbanks==0.4.0", AUDIO)
def open_unmix():
    from openunmix.model import OpenUnmix

    module = OpenUnmix(nb_bins=65, nb_channels=2, hidden_size=64, max_bin=40)
    return module, lambda rows, steps: (torch.rand(rows, 2, 65, steps),)


@program("encodec: SLSTM", *ENCODEC, streams=True)
def encodec_lstm():
    from encodec.modules import SLSTM

    return SLSTM(64), lambda rows, steps: (torch.randn(rows, 64, steps),)


@program("encodec: SEANetEncoder", *ENCODEC, sizes=WAVES)
def encodec_encoder():
    from encodec.modules import SEANetEncoder

    module = SEANetEncoder(dimension=32, n_filters=8, causal=True, norm="weight_norm")
    return module, lambda rows, samples: (torch.randn(rows, 1, samples),)


@program("encodec: SEANetDecoder", *ENCODEC)
def encodec_decoder():
    from encodec.modules import SEANetDecoder

    module = SEANetDecoder(dimension=32, n_filters=8, causal=True, norm="weight_norm")
    return module, lambda rows, steps: (torch.randn(rows, 32, steps),)


@program("asteroid: LSTMTasNet", *ASTEROID, sizes=WAVES, runtime=True)
def lstm_tasnet():
    from asteroid.models import LSTMTasNet

    module = LSTMTasNet(n_src=2, n_layers=2, hid_size=64, n_filters=32, bidirectional=False)
    return module, lambda rows, samples: (torch.randn(rows, samples),)


@program("asteroid: LSTMMasker", *ASTEROID)
def lstm_masker():
    from asteroid.masknn import LSTMMasker

    module = LSTMMasker(in_chan=32, n_src=2, n_layers=2, hid_size=64)
    return module, lambda rows, steps: (torch.randn(rows, 32, steps),)


@program("asteroid: DPRNN", *ASTEROID, served=4, runtime=True)
def dprnn():
    from asteroid.masknn import DPRNN

    module = DPRNN(in_chan=32, n_src=2, bn_chan=32, hid_size=32, chunk_size=10, n_repeats=2)
    return module, lambda rows, steps: (torch.randn(rows, 32, steps),)


@program(
    "asteroid: DCCRMaskNetRNN", *ASTEROID, served=4, runtime=True
)  # DCCRNet itself can't be built with this PyTorch
def dccrn():
    from asteroid.masknn.recurrent import DCCRMaskNetRNN

    return DCCRMaskNetRNN(32, 32), lambda rows, steps: (torch.randn(rows, 8, 4, steps, dtype=torch.complex64),)


@program("speechbrain: CRDNN, LSTM", *SPEECHBRAIN)
def crdnn():
    from speechbrain.lobes.models.CRDNN import CRDNN
    from speechbrain.nnet.RNN import LSTM

    module = CRDNN(input_size=40, cnn_channels=[8, 16], rnn_class=LSTM, rnn_layers=2, rnn_neurons=64, dnn_neurons=64)
    return module, lambda rows, steps: (torch.rand(rows, steps, 40),)


@program("speechbrain: CRDNN, LiGRU", *SPEECHBRAIN, served=0, runtime=True)
def crdnn_ligru():
    from speechbrain.lobes.models.CRDNN import CRDNN

    module = CRDNN(input_size=40, cnn_channels=[8, 16], rnn_layers=2, rnn_neurons=64, dnn_neurons=64)
    return module, lambda rows, steps: (torch.rand(rows, steps, 40),)


@program("speechbrain: LiGRU", *SPEECHBRAIN, served=2, cells=True, runtime=True)
def ligru():
    from speechbrain.nnet.RNN import LiGRU

    return LiGRU(64, (2, 20, 40), num_layers=2), lambda rows, steps: (torch.rand(rows, steps, 40),)


@program("speechbrain: RNNLM", *SPEECHBRAIN, streams=True)
def rnnlm():
    from speechbrain.lobes.models.RNNLM import RNNLM

    module = RNNLM(50, embedding_dim=32, rnn_neurons=64, dnn_neurons=64, return_hidden=True)
    return module, lambda rows, steps: (torch.randint(0, 50, (rows, steps)),)


@program("speechbrain: Dual_Path_Model", *SPEECHBRAIN, served=4, runtime=True)
def dual_path():
    from speechbrain.lobes.models.dual_path import Dual_Path_Model, SBRNNBlock

    def block():
        return SBRNNBlock(32, 32, 1)

    module = Dual_Path_Model(32, 32, block(), block(), num_layers=2, K=10, num_spks=2)
    return module, lambda rows, steps: (torch.randn(rows, 32, steps),)


@program("speechbrain: AttentionalRNNDecoder", *SPEECHBRAIN, served=1, runtime=True)
def attentional_decoder():
    from speechbrain.nnet.RNN import AttentionalRNNDecoder

    module = AttentionalRNNDecoder(
        rnn_type="gru", attn_type="content", hidden_size=32, attn_dim=16, num_layers=1, enc_dim=24, input_size=16
    )
    return module, lambda rows, steps: (torch.randn(rows, 5, 16), torch.randn(rows, steps, 24), torch.ones(rows))


@program("torchaudio: DeepSpeech", AUDIO)
def deepspeech():
    from torchaudio.models import DeepSpeech

    return DeepSpeech(40, n_hidden=64), lambda rows, steps: (torch.randn(rows, 1, steps, 40),)


@program("torchaudio: Tacotron2's encoder", AUDIO, sizes=LENGTHS)
def tacotron2_encoder():
    from torchaudio.models import Tacotron2

    module = Tacotron2(encoder_embedding_dim=64, symbol_embedding_dim=64).encoder
    return module, lambda rows, steps: (torch.randn(rows, 64, steps), lengths(rows, steps))


@program("torchaudio: Tacotron2's decoder", AUDIO, served=2, refused="gives another output")
def tacotron2_decoder():
    from torchaudio.models import Tacotron2

    module = Tacotron2(
        n_mels=20,
        encoder_embedding_dim=64,
        symbol_embedding_dim=64,
        decoder_rnn_dim=64,
        attention_rnn_dim=64,
        prenet_dim=32,
    ).decoder
    return module, lambda rows, steps: (
        torch.randn(rows, 12, 64),
        torch.randn(rows, 20, steps),
        torch.full((rows,), 12),
    )


@program(
    "torchaudio: WaveRNN", AUDIO, sizes=((2, 9), (1, 9), (3, 9), (2, 12), (2, 6)), served=2, runtime=True, accepts=3
)
def wavernn():
    from torchaudio.models import WaveRNN

    module = WaveRNN(
        (4, 5), n_classes=64, hop_length=20, n_res_block=2, n_rnn=64, n_fc=64, n_freq=20, n_hidden=32, n_output=32
    )
    return module, lambda rows, frames: (torch.randn(rows, 1, (frames - 4) * 20), torch.randn(rows, 1, 20, frames))


@program("torchaudio: RNNT's predictor", AUDIO, sizes=LENGTHS, served=2, cells=True, runtime=True)
def rnnt_predictor():
    from torchaudio.models.rnnt import emformer_rnnt_model

    module = emformer_rnnt_model(
        input_dim=20,
        encoding_dim=64,
        num_symbols=50,
        segment_length=16,
        right_context_length=4,
        time_reduction_input_dim=32,
        time_reduction_stride=4,
        transformer_num_heads=4,
        transformer_ffn_dim=64,
        transformer_num_layers=1,
        transformer_dropout=0.1,
        transformer_activation="gelu",
        transformer_left_context_length=30,
        transformer_max_memory_size=0,
        transformer_weight_init_scale_strategy="depthwise",
        transformer_tanh_on_mem=True,
        symbol_embedding_dim=64,
        num_lstm_layers=2,
        lstm_layer_norm=True,
        lstm_layer_norm_epsilon=1e-3,
        lstm_dropout=0.3,
    ).predictor
    return module, lambda rows, steps: (torch.randint(0, 50, (rows, steps)), lengths(rows, steps))


@program("torchaudio: HDemucs", AUDIO, sizes=((1, 8192), (2, 8192), (1, 10240)), served=4, refused="spectrum")
def hdemucs():
    from torchaudio.models import HDemucs

    module = HDemucs(["vocals", "drums"], channels=8, depth=6, nfft=2048)
    return module, lambda rows, samples: (torch.randn(rows, 2, samples),)


@program(
    "pyannote.audio: PyanNet",
    "pyannote.audio==4.0.7",
    "pyannote.core==6.1.0",
    "pyannote.database==6.1.1",
    "pyannote.pipeline==4.1.0",
    "pyannote.metrics==4.2.0",
    "asteroid-filterbanks==0.4.0",
    "optuna==5.0.0",
    "colorlog==6.12.0",
    "pytz",
    *AUGMENTATIONS,
    *OPENTELEMETRY,
    *LIBROSA,
    *HUB,
    *REQUESTS,
    AUDIO,
    sizes=((2, 8000), (1, 8000), (3, 8000), (2, 16000), (2, 4800)),
)
def pyannet():
    from pyannote.audio.core.task import Problem, Resolution, Specifications
    from pyannote.audio.models.segmentation import PyanNet

    module = PyanNet(lstm={"hidden_size": 32}, linear={"hidden_size": 32})
    module.specifications = Specifications(
        Problem.MULTI_LABEL_CLASSIFICATION, Resolution.FRAME, duration=1.0, classes=["a", "b", "c"]
    )
    module.build()
    return module, lambda rows, samples: (torch.randn(rows, 1, samples),)


@program("TTS: Tacotron2's encoder", *TTS, sizes=LENGTHS)
def tts_encoder():
    skip_init("TTS")
    from TTS.tts.layers.tacotron.tacotron2 import Encoder

    return Encoder(64), lambda rows, steps: (torch.randn(rows, 64, steps), lengths(rows, steps))


@program("TTS: Tacotron's encoder (CBHG)", *TTS)
def tts_cbhg():
    skip_init("TTS")
    from TTS.tts.layers.tacotron.tacotron import Encoder

    return Encoder(64), lambda rows, steps: (torch.randn(rows, steps, 64),)


@program("TTS: LSTMSpeakerEncoder", *TTS, served=2)
def tts_speaker():
    skip_init("TTS")
    from TTS.encoder.models.lstm import LSTMSpeakerEncoder

    module = LSTMSpeakerEncoder(40, proj_dim=32, lstm_dim=64, num_lstm_layers=2)
    return module, lambda rows, steps: (torch.randn(rows, 40, steps),)


@program("TTS: LSTMSpeakerEncoder, last state", *TTS)
def tts_speaker_state():
    skip_init("TTS")
    from TTS.encoder.models.lstm import LSTMSpeakerEncoder

    module = LSTMSpeakerEncoder(40, proj_dim=32, lstm_dim=64, num_lstm_layers=2, use_lstm_with_projection=False)
    return module, lambda rows, steps: (torch.randn(rows, 40, steps),)


@program("demucs: Demucs", "demucs==4.1.0", "julius==0.2.8", AUDIO, sizes=WAVES, runtime=True)
def demucs():
    from demucs.demucs import Demucs

    module = Demucs(["vocals", "drums"], channels=8, depth=4, lstm_layers=2, dconv_mode=0)
    return module, lambda rows, samples: (torch.randn(rows, 2, samples),)


@program(
    "demucs: Demucs, LSTM and attention in its branches",
    "demucs==4.1.0",
    "julius==0.2.8",
    AUDIO,
    sizes=WAVES,
    served=4,
    runtime=True,
)
def demucs_branches():
    from demucs.demucs import Demucs

    module = Demucs(["vocals", "drums"], channels=8, depth=5, dconv_attn=3, dconv_lstm=3)
    return module, lambda rows, samples: (torch.randn(rows, 2, samples),)


@program("denoiser: Demucs", "denoiser==0.1.5", AUDIO, sizes=WAVES, runtime=True)
def denoiser():
    from denoiser.demucs import Demucs

    return Demucs(hidden=8, depth=4), lambda rows, samples: (torch.randn(rows, 1, samples),)


@program(
    "piano_transcription_inference: AcousticModelCRnn8Dropout",
    "piano_transcription_inference==0.0.6",
    "torchlibrosa==0.1.0",
    *LIBROSA,
    "mido==1.3.3",
)
def piano():
    from piano_transcription_inference.models import AcousticModelCRnn8Dropout

    module = AcousticModelCRnn8Dropout(classes_num=88, midfeat=256, momentum=0.01)
    return module, lambda rows, steps: (torch.randn(rows, 1, steps, 32),)


@program(
    "deepfilternet: DfNet",
    "deepfilternet==0.5.6",
    "deepfilterlib==0.5.6",
    "loguru==0.7.3",
    served=3,
    runtime=True,
)
def deepfilternet():
    skip_init("df")
    from df.config import config
    from df.deepfilternet3 import init_model

    if config.parser is None:
        config.use_defaults()
    module = init_model()
    return module, lambda rows, steps: (
        torch.randn(rows, 1, steps, 481, 2),
        torch.randn(rows, 1, steps, 32),
        torch.randn(rows, 1, steps, 96, 2),
    )


@program(
    "Resemblyzer: VoiceEncoder",
    "Resemblyzer==0.1.4",
    "webrtcvad-wheels==2.0.14.post1",
    *LIBROSA,
    *REQUESTS,
    streams=True,
)
def voice_encoder():
    from resemblyzer import VoiceEncoder

    return VoiceEncoder("cpu", verbose=False), lambda rows, steps: (torch.rand(rows, steps, 40),)


@program("voicefixer: BN_GRU", "voicefixer==0.1.3", "torchlibrosa==0.1.0", *LIBROSA, *SOUND, AUDIO)
def voicefixer():
    skip_init("voicefixer")
    skip_init("voicefixer.restorer")
    skip_init("voicefixer.vocoder")
    from voicefixer.restorer.model import BN_GRU

    module = BN_GRU(input_dim=32, hidden_dim=64, bidirectional=True, batchnorm=True)
    return module, lambda rows, steps: (torch.randn(rows, 1, steps, 32),)


ESPNET = "espnet==202511"


def _espnet():
    for package in ("espnet2", "espnet2.enh", "espnet2.enh.layers"):
        skip_init(package)


@program("espnet: DPRNN", ESPNET, served=4, runtime=True)
def espnet_dprnn():
    _espnet()
    from espnet2.enh.layers.dprnn import DPRNN

    return DPRNN("LSTM", 16, 32, 16, num_layers=2), lambda rows, steps: (torch.randn(rows, 16, 5, steps),)


@program("espnet: SkiM", ESPNET, served=4, runtime=True)
def espnet_skim():
    _espnet()
    from espnet2.enh.layers.skim import SkiM

    return SkiM(16, 32, 16, segment_size=5), lambda rows, steps: (torch.randn(rows, steps, 16),)
