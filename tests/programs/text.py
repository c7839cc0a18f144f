"""Programs for text, and for lists of items that a user clicked."""

import torch

from programs.harness import program, skip_init
from programs.needs import NEEDS


def ids(rows, steps, count):
    """Return random ids, without 0 and 1, which often are padding."""
    return torch.randint(2, count, (rows, steps))


def lengths(rows, steps):
    """Return lengths in descending order; the first is the greatest."""
    return torch.linspace(steps, max(1, steps // 2), rows).long()


def _started(module):
    """Give a module the random weights of OpenNMT's build_model; its constructors leave some of them undefined."""
    for weight in module.parameters():
        torch.nn.init.uniform_(weight, -0.1, 0.1)
    return module


def _onmt(decoder):
    from onmt.encoders.rnn_encoder import RNNEncoder
    from onmt.models import NMTModel
    from onmt.modules import Embeddings

    encoder = RNNEncoder("LSTM", True, 2, 64, 0.1, Embeddings(32, 100, 1))
    module = NMTModel(encoder, decoder("LSTM", True, 2, 64, dropout=0.1, embeddings=Embeddings(32, 90, 1)))
    _started(module)

    def call(rows, steps):
        return ids(rows, steps, 100)[..., None], ids(rows, 9, 90)[..., None], lengths(rows, steps)

    return module, call


@program("OpenNMT: RNNEncoder", *NEEDS["OpenNMT"])
def onmt_encoder():
    from onmt.encoders.rnn_encoder import RNNEncoder
    from onmt.modules import Embeddings

    module = _started(RNNEncoder("LSTM", True, 2, 64, 0.1, Embeddings(32, 100, 1)))
    return module, lambda rows, steps: (ids(rows, steps, 100)[..., None], lengths(rows, steps))


@program(
    "OpenNMT: NMTModel, attention after the LSTM",
    *NEEDS["OpenNMT"],
    served=2,
    runtime=True,
)
def onmt_standard():
    from onmt.decoders.decoder import StdRNNDecoder

    return _onmt(StdRNNDecoder)


@program(
    "OpenNMT: NMTModel, attention as an input",
    *NEEDS["OpenNMT"],
    served=3,
    runtime=True,
)
def onmt_input_feed():
    from onmt.decoders.decoder import InputFeedRNNDecoder

    return _onmt(InputFeedRNNDecoder)


@program("fastai: AWD_LSTM language model", *NEEDS["fastai"], served=2, refused="keeps a state between calls")
def fastai_language_model():
    from fastai.text.models.awdlstm import AWD_LSTM, awd_lstm_lm_config
    from fastai.text.models.core import get_language_model

    config = awd_lstm_lm_config | {"emb_sz": 32, "n_hid": 64, "n_layers": 2}
    return get_language_model(AWD_LSTM, 100, config), lambda rows, steps: (ids(rows, steps, 100),)


@program(
    "fastai: AWD_LSTM classifier",
    *NEEDS["fastai"],
    served=2,
    refused="Equal '/0/Equal': the operator isn't supported (core.py",
)
def fastai_classifier():
    from fastai.text.models.awdlstm import AWD_LSTM, awd_lstm_clas_config
    from fastai.text.models.core import get_text_classifier

    config = awd_lstm_clas_config | {"emb_sz": 32, "n_hid": 64, "n_layers": 2}
    return get_text_classifier(AWD_LSTM, 100, 3, config=config), lambda rows, steps: (ids(rows, steps, 100),)


@program("flair: LanguageModel", *NEEDS["flair"], streams=True)
def flair_language_model():
    from flair.data import Dictionary
    from flair.models import LanguageModel

    letters = Dictionary()
    for letter in "abcdefghijklmnopqrstuvwxyz ,.":
        letters.add_item(letter)
    module = LanguageModel(letters, True, 64, 1, embedding_size=32)

    def call(rows, steps):
        return ids(steps, rows, len(letters)), (torch.zeros(1, rows, 64), torch.zeros(1, rows, 64))

    return module, call


@program("flair: SequenceTagger", *NEEDS["flair"], runtime=True)
def flair_tagger():
    from flair.data import Dictionary
    from flair.embeddings import OneHotEmbeddings
    from flair.models import SequenceTagger

    words, tags = Dictionary(), Dictionary()
    for word in ("the", "cat", "sat"):
        words.add_item(word)
    for tag in ("PER", "LOC"):
        tags.add_item(tag)
    module = SequenceTagger(OneHotEmbeddings(words, embedding_length=24), tags, "ner", hidden_size=32)
    return module, lambda rows, steps: (torch.randn(rows, steps, 24), lengths(rows, steps))


@program("stanza: Tokenizer", *NEEDS["stanza"])
def stanza_tokenizer():
    from stanza.models.tokenization.model import Tokenizer

    options = {"feat_dim": 5, "rnn_layers": 1, "conv_res": None, "use_mwt": True, "hierarchical": False, "tok_noise": 0}
    module = Tokenizer(options, 100, 32, 64, 0.1, 0.05)

    def call(rows, steps):
        return ids(rows, steps, 100), torch.rand(rows, steps, 5), lengths(rows, steps)

    return module, call


@program("stanza: LangIDBiLSTM", *NEEDS["stanza"])
def stanza_language():
    from stanza.models.langid.model import LangIDBiLSTM

    letters = {"<PAD>": 0} | {letter: n + 1 for n, letter in enumerate("abcdefghijklmnopqrstuvwxyz")}
    module = LangIDBiLSTM(letters, {"en": 0, "de": 1, "fr": 2}, 2, 32, 64)
    module.build_lang_mask("cpu")
    return module, lambda rows, steps: (ids(rows, steps, 27),)


@program("stanza: CharacterLanguageModel", *NEEDS["stanza"], streams=True)
def stanza_characters():
    from stanza.models.common.char_model import CharacterLanguageModel

    options = {"char_emb_dim": 32, "char_hidden_dim": 64, "char_num_layers": 1, "char_dropout": 0.1}
    module = CharacterLanguageModel(options | {"char_rec_dropout": 0}, {"char": range(60)})
    return module, lambda rows, steps: (ids(rows, steps, 60), lengths(rows, steps))


@program("stanza: Seq2SeqModel of the lemmatizer", *NEEDS["stanza"], served=2, runtime=True)
def stanza_lemmatizer():
    from stanza.models.common.seq2seq_model import Seq2SeqModel

    options = {"vocab_size": 60, "emb_dim": 32, "hidden_dim": 64, "num_layers": 1, "dropout": 0.1, "max_dec_len": 50}
    module = Seq2SeqModel(options | {"attn_type": "soft"})

    def call(rows, steps):
        masked = torch.arange(steps)[None] >= lengths(rows, steps)[:, None]
        return ids(rows, steps, 60), masked, ids(rows, 9, 60)

    return module, call


@program("supar: CharLSTM", *NEEDS["supar"], runtime=True)
def supar_characters():
    from supar.modules import CharLSTM

    return CharLSTM(60, 32, 64, 50), lambda rows, steps: (ids(rows * 5, steps, 60).reshape(rows, 5, steps),)


@program("supar: VariationalLSTM", *NEEDS["supar"], served=4, refused="Split")
def supar_variational():
    from supar.modules import VariationalLSTM
    from torch.nn.utils.rnn import pack_padded_sequence

    def call(rows, steps):
        return (pack_padded_sequence(torch.randn(rows, steps, 16), lengths(rows, steps), True, False),)

    return VariationalLSTM(16, 32, 2, bidirectional=True, dropout=0.3), call


def _recbole(**options):
    class Items:
        """Recbole's data set, of which a model reads the number of items."""

        def num(self, field):
            return 100

    config = {
        "USER_ID_FIELD": "user",
        "ITEM_ID_FIELD": "item",
        "LIST_SUFFIX": "_list",
        "ITEM_LIST_LENGTH_FIELD": "length",
        "NEG_PREFIX": "neg_",
        "MAX_ITEM_LIST_LENGTH": 50,
        "device": "cpu",
        "embedding_size": 32,
        "hidden_size": 64,
        "loss_type": "CE",
    }
    return config | options, Items()


@program("recbole: GRU4Rec", *NEEDS["recbole"], streams=True)
def recbole_gru():
    from recbole.model.sequential_recommender.gru4rec import GRU4Rec

    module = GRU4Rec(*_recbole(num_layers=1, dropout_prob=0.3))
    return module, lambda rows, steps: (ids(rows, steps, 100), lengths(rows, steps))


@program("recbole: NARM", *NEEDS["recbole"], runtime=True)
def recbole_narm():
    from recbole.model.sequential_recommender.narm import NARM

    module = NARM(*_recbole(n_layers=1, dropout_probs=[0.25, 0.5]))
    return module, lambda rows, steps: (ids(rows, steps, 100), lengths(rows, steps))


def _dien(kind):
    from deepctr_torch.inputs import SparseFeat, VarLenSparseFeat
    from deepctr_torch.models.dien import DIEN

    clicked = VarLenSparseFeat(SparseFeat("hist_item", 30, 16, embedding_name="item"), 20, length_name="clicks")
    columns = [SparseFeat("user", 10, 16), SparseFeat("item", 30, 16), clicked]
    module = DIEN(columns, ["item"], gru_type=kind, att_weight_normalization=True, init_std=0.1)

    def call(rows, steps):
        one = [torch.randint(1, count, (rows, 1)) for count in (10, 30)]
        return (torch.cat([*one, torch.randint(1, 30, (rows, 20)), lengths(rows, 20)[:, None]], 1).float(),)

    return module, call


@program(
    "deepctr-torch: DIEN, AUGRU",
    *NEEDS["deepctr-torch"],
    sizes=((2, 20), (1, 20), (12, 20)),
    served=2,
    cells=True,
    refused="lengths that it computes",
)
def dien_augru():
    return _dien("AUGRU")


@program(
    "deepctr-torch: DIEN, AIGRU",
    *NEEDS["deepctr-torch"],
    sizes=((2, 20), (1, 20), (12, 20)),
    served=2,
    runtime=True,
)
def dien_aigru():
    return _dien("AIGRU")


@program("minGRU-pytorch: minLM", *NEEDS["minGRU-pytorch"], served=2, cells=True, runtime=True)
def mingru_language_model():
    from minGRU_pytorch.minLM import minLM

    return minLM(num_tokens=60, dim=32, depth=2), lambda rows, steps: (ids(rows, steps, 60),)


@program("moses: CharRNN", *NEEDS["moses"], streams=True)
def moses_characters():
    skip_init("moses")
    skip_init("moses.char_rnn")
    from moses.char_rnn.model import CharRNN

    class Letters(list):
        pad = 0

    class Options:
        hidden, num_layers, dropout = 64, 2, 0.1

    return CharRNN(Letters(range(40)), Options()), lambda rows, steps: (ids(rows, steps, 40), lengths(rows, steps))
