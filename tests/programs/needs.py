"""The packages that programs need, with all that their imports load, each with its exact version."""

VERSIONS = {
    "ai4ts": "0.0.3",
    "annotated_doc": "0.0.7",
    "annotated_types": "0.8.0",
    "anyio": "4.16.0",
    "beartype": "0.23.1",
    "beautifulsoup4": "4.15.0",
    "benchpots": "1",
    "bioc": "2.1",
    "blis": "1.3.4",
    "boto3": "1.44.8",
    "botocore": "1.44.8",
    "cachebox": "6.2.10",
    "catalogue": "2.0.10",
    "certifi": "2026.10.19.post1",
    "cffi": "2.1.1",
    "charset_normalizer": "3.5.3",
    "click": "8.5.1",
    "colorama": "0.4.6",
    "colorlog": "6.12.0",
    "confection": "1.3.4",
    "configargparse": "1.9.0",
    "conllu": "6.0.0",
    "coreforecast": "0.0.20",
    "cymem": "2.0.16",
    "darts": "0.41.0",
    "deepctr_torch": "0.3.0",
    "deepdiff": "9.1.0",
    "dill": "0.4.1",
    "emoji": "2.16.0",
    "fastai": "2.8.12",
    "fastcore": "2.2.41",
    "fastdownload": "0.0.8",
    "fastprogress": "1.1.6",
    "fasttext_numpy2_wheel": "0.9.2",
    "fasttransform": "0.0.5",
    "flair": "0.15.1",
    "flood_forecast": "1.0.dev0",
    "ftfy": "6.3.1",
    "gdown": "6.5.1",
    "gluonts": "0.17.0",
    "httpx": "0.28.1",
    "huggingface_hub": "0.36.2",
    "itsdangerous": "2.2.0",
    "jmespath": "1.1.0",
    "lxml": "6.1.3",
    "minGRU-pytorch": "0.2.1",
    "molsets": "0.3.1",
    "msgpack": "1.2.4",
    "murmurhash": "1.0.16",
    "ncps": "1.0.1",
    "neuralforecast": "3.3.0",
    "neuralhydrology": "1.13.0",
    "nfoursid": "1.0.2",
    "nltk": "3.10.4",
    "nonlinear_benchmarks": "1.0.1",
    "OpenNMT_py": "3.5.1",
    "orderly_set": "5.5.0",
    "orjson": "3.13.0",
    "overrides": "7.7.0",
    "patsy": "1.0.3",
    "pettingzoo": "1.27.0",
    "plum_dispatch": "2.10.1",
    "preshed": "3.0.15",
    "progressbar2": "4.6.0",
    "pyahocorasick": "2.3.1",
    "pydantic": "2.14.4",
    "pydantic_core": "2.50.5",
    "pygrinder": "0.7",
    "pykt_toolkit": "0.0.38",
    "pyonmttok": "1.38.1",
    "pypots": "1.5",
    "python_fasthtml": "0.14.14",
    "python_multipart": "0.0.34",
    "pytorch_forecasting": "1.8.0",
    "pytz": "2026.6",
    "pyvers": "0.2.3",
    "rapidfuzz": "3.14.6",
    "ray": "2.60.0",
    "recbole": "1.2.1",
    "regex": "2026.11.19",
    "requests": "2.34.2",
    "rl_games": "1.6.5",
    "rsl_rl_lib": "5.5.1",
    "ruamel_yaml": "0.19.1",
    "s3transfer": "0.19.3",
    "sb3_contrib": "2.9.2",
    "segtok": "1.5.11",
    "sensai_utils": "1.6.0",
    "sentencepiece": "0.2.3",
    "shellingham": "1.5.4",
    "sktime": "1.2.0",
    "soundfile": "0.14.0",
    "soupsieve": "4.1.3",
    "soxr": "1.1.0",
    "spacy": "3.8.18",
    "srsly": "2.5.6",
    "stable_baselines3": "2.9.2",
    "stanza": "1.15.0",
    "starlette": "1.10.0",
    "statsmodels": "0.15.0",
    "supar": "1.1.4",
    "tensordict": "0.15.3",
    "termcolor": "3.3.0",
    "texttable": "1.7.2",
    "thinc": "8.3.14",
    "tianshou": "2.0.1",
    "tokenizers": "0.22.2",
    "toolz": "1.2.0",
    "torch_geometric": "2.8.1",
    "torch_geometric_temporal": "0.56.2",
    "torchrl": "0.14.1",
    "torchvision": "0.28.0",
    "transformer_smaller_training_vocab": "0.4.2",
    "transformers": "4.57.6",
    "tsai": "1.0.1",
    "tsdb": "0.8",
    "typer": "0.29.2",
    "typing_inspection": "0.4.5",
    "udapi": "0.5.2",
    "udtools": "0.2.9",
    "urllib3": "2.8.0",
    "utilsforecast": "0.2.17",
    "wasabi": "1.1.3",
    "weasel": "1.0.1",
    "xarray": "2026.9.0",
    "xxhash": "4.1.0",
}

PACKAGES = {
    "OpenNMT": (
        "OpenNMT_py annotated_doc annotated_types blis catalogue certifi charset_normalizer click confection "
        "configargparse cymem fasttext_numpy2_wheel httpx murmurhash preshed pyahocorasick pydantic pydantic_core "
        "pyonmttok rapidfuzz regex requests shellingham spacy srsly thinc typer typing_inspection urllib3 wasabi "
        "weasel"
    ),
    "PyG": "certifi charset_normalizer huggingface_hub pytz regex requests torch_geometric urllib3 xxhash",
    "PyG temporal": (
        "certifi charset_normalizer huggingface_hub pytz regex requests torch_geometric "
        "torch_geometric_temporal urllib3 xxhash"
    ),
    "darts": (
        "certifi charset_normalizer darts huggingface_hub nfoursid patsy pytz regex requests statsmodels urllib3 xarray"
    ),
    "deepctr-torch": "certifi charset_normalizer deepctr_torch pytz requests urllib3",
    "fastai": (
        "anyio beartype certifi charset_normalizer fastai fastcore fastdownload fastprogress fasttransform "
        "itsdangerous plum_dispatch python_fasthtml python_multipart pytz requests starlette urllib3"
    ),
    "flair": (
        "beautifulsoup4 bioc boto3 botocore certifi charset_normalizer conllu flair ftfy gdown huggingface_hub "
        "jmespath lxml pytz regex requests s3transfer segtok sentencepiece soupsieve tokenizers "
        "transformer_smaller_training_vocab transformers urllib3"
    ),
    "flood_forecast": "flood_forecast",
    "gluonts": (
        "certifi charset_normalizer gluonts huggingface_hub orjson pydantic pydantic_core pytz regex requests toolz "
        "typing_inspection urllib3"
    ),
    "minGRU-pytorch": "minGRU-pytorch",
    "moses": "molsets",
    "ncps": "ncps",
    "neuralforecast": (
        "annotated_types certifi charset_normalizer coreforecast huggingface_hub msgpack neuralforecast pydantic "
        "pydantic_core pytz ray regex requests typing_inspection urllib3 utilsforecast"
    ),
    "neuralhydrology": "neuralhydrology pytz ruamel_yaml xarray",
    "pykt": "pykt_toolkit",
    "pypots": (
        "ai4ts benchpots boto3 botocore certifi cffi charset_normalizer huggingface_hub jmespath nonlinear_benchmarks "
        "progressbar2 pygrinder pypots pytz regex requests s3transfer soundfile soxr tokenizers transformers tsdb "
        "urllib3"
    ),
    "pytorch-forecasting": "certifi charset_normalizer huggingface_hub pytorch_forecasting pytz regex requests urllib3",
    "recbole": "boto3 botocore certifi colorama colorlog jmespath pytz recbole s3transfer texttable urllib3",
    "rl_games": "rl_games",
    "rsl-rl": "boto3 botocore certifi jmespath pyvers rsl_rl_lib s3transfer tensordict urllib3",
    "sb3-contrib": "sb3_contrib stable_baselines3",
    "sktime": "sktime",
    "stanza": (
        "certifi charset_normalizer colorama emoji huggingface_hub orjson regex requests stanza termcolor transformers "
        "udapi udtools urllib3"
    ),
    "supar": "dill charset_normalizer nltk pytz regex supar",
    "tianshou": (
        "boto3 botocore cachebox certifi charset_normalizer deepdiff jmespath msgpack orderly_set orjson overrides "
        "pettingzoo pydantic pydantic_core pytz ray requests s3transfer sensai_utils tianshou typing_inspection "
        "urllib3"
    ),
    "torchrl": "certifi charset_normalizer msgpack pyvers ray requests tensordict torchrl urllib3",
    "tsai": (
        "anyio beartype certifi charset_normalizer fastai fastcore fastdownload fastprogress fasttransform "
        "itsdangerous plum_dispatch python_fasthtml python_multipart pytz requests starlette torchvision tsai urllib3"
    ),
}

NEEDS = {program: tuple(f"{name}=={VERSIONS[name]}" for name in names.split()) for program, names in PACKAGES.items()}
