"""Programs that classify, forecast or complete time series."""

import torch

from programs.harness import program, skip_init
from programs.needs import NEEDS


@program("tsai: LSTM", *NEEDS["tsai"], streams=True)
def tsai_lstm():
    from tsai.models.RNN import LSTM

    return LSTM(3, 5, hidden_size=64, n_layers=2), lambda rows, steps: (torch.randn(rows, 3, steps),)


@program("tsai: LSTM_FCN", *NEEDS["tsai"], sizes=((2, 20), (1, 20), (12, 20)), runtime=True)
def tsai_lstm_fcn():
    from tsai.models.RNN_FCN import LSTM_FCN

    return LSTM_FCN(3, 5, seq_len=20), lambda rows, steps: (torch.randn(rows, 3, steps),)


@program("tsai: MGRU_FCN", *NEEDS["tsai"])
def tsai_gru_fcn():
    from tsai.models.RNN_FCN import MGRU_FCN

    return MGRU_FCN(3, 5, shuffle=False), lambda rows, steps: (torch.randn(rows, 3, steps),)


@program("tsai: LSTMPlus", *NEEDS["tsai"], served=2)
def tsai_lstm_plus():
    from tsai.models.RNNPlus import LSTMPlus

    module = LSTMPlus(3, 5, hidden_size=[64, 32], bidirectional=True)
    return module, lambda rows, steps: (torch.randn(rows, 3, steps),)


@program("tsai: LSTMAttention", *NEEDS["tsai"], sizes=((2, 20), (1, 20), (12, 20)))
def tsai_lstm_attention():
    from tsai.models.RNNAttention import LSTMAttention

    module = LSTMAttention(3, 5, 20, hidden_size=32, n_heads=4, d_ff=64, encoder_layers=1)
    return module, lambda rows, steps: (torch.randn(rows, 3, steps),)


@program("sktime: GRUFCNN", *NEEDS["sktime"])
def sktime_gru_fcn():
    from sktime.networks.gru import GRUFCNN

    module = GRUFCNN(input_size=3, hidden_dim=32, gru_layers=1, batch_first=True, num_classes=4)
    return module, lambda rows, steps: (torch.randn(rows, steps, 3),)


def _darts():
    return {
        "input_chunk_length": 20,
        "output_chunk_length": 4,
        "train_sample_shape": [(20, 2), (20, 1), None, (4, 2)],
        "loss_fn": torch.nn.MSELoss(),
        "torch_metrics": None,
        "optimizer_cls": torch.optim.Adam,
        "lr_scheduler_cls": None,
        "input_size": 3,
        "target_size": 2,
        "nr_params": 1,
        "num_layers": 2,
        "hidden_dim": 32,
        "dropout": 0.1,
    }


@program("darts: RNNModel", *NEEDS["darts"], streams=True)
def darts_rnn():
    from darts.models.forecasting.rnn_model import _RNNModule

    return _RNNModule(name="LSTM", **_darts()), lambda rows, steps: ((torch.randn(rows, steps, 3), None, None),)


@program("darts: BlockRNNModel", *NEEDS["darts"])
def darts_block():
    from darts.models.forecasting.block_rnn_model import _BlockRNNModule

    module = _BlockRNNModule(name="GRU", num_layers_out_fc=[16], future_cov_dim=0, **_darts())
    return module, lambda rows, steps: ((torch.randn(rows, steps, 3), None, None),)


def _windows(rows, steps):
    names = ("futr_exog", "hist_exog", "stat_exog")
    return ({"insample_y": torch.randn(rows, steps, 1), **dict.fromkeys(names)},)


@program("neuralforecast: LSTM", *NEEDS["neuralforecast"])
def neuralforecast_lstm():
    from neuralforecast.models.lstm import LSTM

    return LSTM(h=4, input_size=20, encoder_hidden_size=64, decoder_hidden_size=32), _windows


@program("neuralforecast: GRU", *NEEDS["neuralforecast"])
def neuralforecast_gru():
    from neuralforecast.models.gru import GRU

    return GRU(h=4, input_size=20, encoder_hidden_size=64, decoder_hidden_size=32), _windows


@program(
    "neuralforecast: DilatedRNN",
    *NEEDS["neuralforecast"],
    sizes=((2, 20), (1, 20), (3, 20)),
    served=4,
    runtime=True,
)
def neuralforecast_dilated():
    from neuralforecast.models.dilated_rnn import DilatedRNN

    return DilatedRNN(h=4, input_size=20, encoder_hidden_size=32, decoder_hidden_size=32), _windows


@program(
    "neuralforecast: DilatedRNN, ResLSTM",
    *NEEDS["neuralforecast"],
    sizes=((2, 20), (1, 20), (3, 20)),
    served=0,
    runtime=True,
)
def neuralforecast_residual():
    from neuralforecast.models.dilated_rnn import DilatedRNN

    module = DilatedRNN(h=4, input_size=20, cell_type="ResLSTM", encoder_hidden_size=32, decoder_hidden_size=32)
    return module, _windows


@program("neuralforecast: DeepAR", *NEEDS["neuralforecast"])
def neuralforecast_deepar():
    from neuralforecast.models.deepar import DeepAR

    return DeepAR(h=4, input_size=20, lstm_hidden_size=64), _windows


def _forecasting(rows, steps):
    """Return the batch of pytorch-forecasting's data loaders, for a history of `steps` and 4 steps to predict."""
    lengths = {"encoder_lengths": torch.full((rows,), steps), "decoder_lengths": torch.full((rows,), 4)}
    return (
        {
            "encoder_cat": torch.randint(0, 3, (rows, steps, 1)),
            "encoder_cont": torch.randn(rows, steps, 2),
            "encoder_target": torch.randn(rows, steps),
            "decoder_cat": torch.randint(0, 3, (rows, 4, 1)),
            "decoder_cont": torch.randn(rows, 4, 2),
            "decoder_target": torch.randn(rows, 4),
            "target_scale": torch.rand(rows, 2) + 0.5,
            **lengths,
        },
    )


def _fields():
    return {
        "static_categoricals": ["shop"],
        "static_reals": [],
        "time_varying_reals_encoder": ["price", "sales"],
        "time_varying_reals_decoder": ["price"],
        "time_varying_categoricals_encoder": [],
        "time_varying_categoricals_decoder": [],
        "x_reals": ["price", "sales"],
        "x_categoricals": ["shop"],
        "embedding_sizes": {"shop": (3, 4)},
        "embedding_paddings": [],
        "embedding_labels": {"shop": {"a": 0, "b": 1, "c": 2}},
        "categorical_groups": {},
    }


@program("pytorch-forecasting: RecurrentNetwork", *NEEDS["pytorch-forecasting"], runtime=True)
def forecasting_rnn():
    from pytorch_forecasting.data.encoders import EncoderNormalizer
    from pytorch_forecasting.models import RecurrentNetwork

    module = RecurrentNetwork(target="sales", output_transformer=EncoderNormalizer(), hidden_size=32, **_fields())
    return module, _forecasting


@program("pytorch-forecasting: DeepAR", *NEEDS["pytorch-forecasting"], runtime=True)
def forecasting_deepar():
    from pytorch_forecasting.data.encoders import EncoderNormalizer
    from pytorch_forecasting.models import DeepAR

    module = DeepAR(target="sales", output_transformer=EncoderNormalizer(), hidden_size=32, **_fields())
    return module, _forecasting


@program("pytorch-forecasting: TemporalFusionTransformer", *NEEDS["pytorch-forecasting"], served=2, runtime=True)
def forecasting_tft():
    from pytorch_forecasting.data.encoders import EncoderNormalizer
    from pytorch_forecasting.models import TemporalFusionTransformer

    module = TemporalFusionTransformer(hidden_size=16, output_transformer=EncoderNormalizer(), **_fields())
    return module, _forecasting


@program("gluonts: DeepAR", *NEEDS["gluonts"], sizes=((2, 20), (1, 20), (3, 20)), refused="draws random numbers")
def gluonts_deepar():
    from gluonts.torch.model.deepar.module import DeepARModel

    module = DeepARModel("h", 20, 4, num_feat_dynamic_real=2, lags_seq=[1, 2, 7], hidden_size=40)

    def call(rows, steps):
        past = 20 + max(module.lags_seq)
        return (
            torch.zeros(rows, 1, dtype=torch.long),
            torch.randn(rows, 1),
            torch.randn(rows, past, 2),
            torch.rand(rows, past),
            torch.ones(rows, past),
            torch.randn(rows, 4, 2),
        )

    return module, call


def _hydrology(model):
    import tempfile
    from pathlib import Path

    from neuralhydrology.utils.config import Config

    return Config(
        {
            "model": model,
            "hidden_size": 64,
            "head": "regression",
            "output_activation": "linear",
            "output_dropout": 0.2,
            "initial_forget_bias": 3,
            "dynamic_inputs": ["rain", "temperature", "radiation"],
            "static_attributes": ["area", "slope"],
            "target_variables": ["discharge"],
            "seq_length": 20,
            "predict_last_n": 1,
            "use_frequencies": [],
            "run_dir": Path(tempfile.gettempdir()),
        }
    )


def _basins(rows, steps):
    names = ("rain", "temperature", "radiation")
    return ({"x_d": {name: torch.randn(rows, steps, 1) for name in names}, "x_s": torch.randn(rows, 2)},)


@program("neuralhydrology: CudaLSTM", *NEEDS["neuralhydrology"])
def hydrology_lstm():
    from neuralhydrology.modelzoo.cudalstm import CudaLSTM

    return CudaLSTM(_hydrology("cudalstm")), _basins


@program("neuralhydrology: EALSTM", *NEEDS["neuralhydrology"], served=0, runtime=True)
def hydrology_ealstm():
    from neuralhydrology.modelzoo.ealstm import EALSTM

    return EALSTM(_hydrology("ealstm")), _basins


@program("pypots: GRU-D", *NEEDS["pypots"], sizes=((2, 20), (1, 20), (3, 20)), runtime=True)
def pypots_grud():
    from pypots.nn.modules.grud import BackboneGRUD

    def call(rows, steps):
        values, seen = torch.randn(rows, steps, 4), (torch.rand(rows, steps, 4) > 0.3).float()
        return values * seen, seen, torch.rand(rows, steps, 4), torch.zeros(4), torch.randn(rows, steps, 4)

    return BackboneGRUD(20, 4, 32), call


@program("ncps: CfC", *NEEDS["ncps"], served=0, runtime=True)
def ncps_cfc():
    from ncps.torch import CfC

    return CfC(6, 32, mixed_memory=True), lambda rows, steps: (torch.randn(rows, steps, 6),)


@program("ncps: LTC", *NEEDS["ncps"], served=0, runtime=True)
def ncps_ltc():
    from ncps.torch import LTC

    return LTC(6, 16, return_sequences=False), lambda rows, steps: (torch.randn(rows, steps, 6),)


@program("flood_forecast: VanillaGRU", *NEEDS["flood_forecast"])
def flood_gru():
    skip_init("flood_forecast")
    from flood_forecast.basic.gru_vanilla import VanillaGRU

    return VanillaGRU(5, 32, 2, 1, 0.1), lambda rows, steps: (torch.randn(rows, steps, 5),)


def _answers(rows, steps):
    return torch.randint(0, 20, (rows, steps)), torch.randint(0, 2, (rows, steps))


@program("pykt: DKVMN", *NEEDS["pykt"], served=0, runtime=True)
def pykt_memory():
    skip_init("pykt")
    skip_init("pykt.models")
    from pykt.models.dkvmn import DKVMN

    return DKVMN(20, 16, 8), _answers


@program("pykt: ATKT", *NEEDS["pykt"], runtime=True)
def pykt_attention():
    skip_init("pykt")
    skip_init("pykt.models")
    from pykt.models.atkt import ATKT

    return ATKT(20, 16, 16, 32), _answers
