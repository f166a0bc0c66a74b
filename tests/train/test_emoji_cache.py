import torch

from tests.train.recipes import CONFIGS
from train.recipe import load
from train.data import Batches, Cache
from train.emoji.cache import write_cache


def test_the_familys_data_becomes_a_cache_of_its_recipes(glyphs, data, tmp_path):
    def to_states(texts):
        seen.update(zip(range(len(seen), len(seen) + len(texts)), texts, strict=True))
        return torch.stack([torch.full((7, 128), float(len(t))) for t in texts])

    seen: dict[int, str] = {}
    path = tmp_path / "cache.safetensors"
    write_cache(path, glyphs, data, to_states, captions=3, seed=0)
    config = load(CONFIGS / "emoji-m2.toml", [f"data.path={path}"])
    source = Cache(path, config)
    assert len(source) == len(data.variants) and not source.empty.states.any()
    names = [glyphs.concepts[v.concept] for v in data.variants]
    for i in (0, 7, len(source) - 1):
        latents = source.examples([i], [0.0]).latents[0]
        assert torch.equal(latents, data.latents[i].float())
        for row in source.captions[0][i].tolist():
            assert seen[row] and any(word in seen[row] for word in (names[i].name, *names[i].tags))
            assert float(source.files[0].get_slice("states")[row : row + 1].unique()) == len(seen[row])
    assert Batches(source, config)(range(4)).context.shape == (4, 7, 128)
