"""Generated images: formulas, and the generator that is trained here."""
import functools
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import one_line
from test_data import folder_of_images

import generate_data as g

FORMULAS = ['fractal', 'spectrum', 'deadleaves']


def formula(name, n=40, size=64, difficulty='medium'):
    labels = g.draw_labels(1, n, 4, 'balanced')
    if name == 'labels':
        labels, name = (np.arange(4) < labels[:, None]).astype(np.uint8), 'fractal'
    return g.Formula(name, labels, 4, size, 5, difficulty)


def generate(out, *flags):
    return g.main(['--kind', 'generated', '--out', out, *flags])


@pytest.mark.parametrize('name', [*FORMULAS, 'labels'])
def test_any_chunk_is_the_same_bytes_with_any_number_of_threads(name):
    images = formula(name)
    assert images.chunk < 40                            # more than one chunk, and a last part
    whole = np.concatenate(list(images.chunks()))
    assert whole.shape == (40, 64, 64, 3) and whole.dtype == np.uint8
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 2)
    try:
        assert (np.concatenate(list(formula(name).chunks())) == whole).all()
    finally:
        torch.set_num_threads(threads)
    torch.set_num_threads(1)
    assert (formula(name).draw(range(16, 16 + images.chunk)) == whole[16:16 + images.chunk]).all()
    torch.set_num_threads(threads)
    assert len(np.unique(whole.reshape(40, -1), axis=0)) == 40 and whole.std() > 10
    if name == 'labels':                                # grey; more labels, more that is drawn
        assert (whole == whole[..., :1]).all()
    other = formula(name, difficulty='hard').draw(range(images.chunk))
    assert (other != whole[:len(other)]).any()


def test_numbers_are_the_same_everywhere_and_never_reach_the_next_class():
    numbers = g.uniforms(0, g.DRAWS, range(3, 8), 32)
    assert hashlib.sha256(numbers.astype('<f8').tobytes()).hexdigest()[:16] == '895fa71dee0f09cd'
    numbers = g.uniforms(534, g.DRAWS, [22557], 32)    # one of them is 1 when rounded to float32
    assert numbers.max() < 1 and numbers.astype(np.float32).max() == 1
    images = g.Formula('fractal', np.zeros(22558, np.int64), 4, 8, 534)
    assert images.random([22557])[0].max() < 1


def test_systems_are_contractive_and_of_the_published_size():
    maps, table = g.fractal_bank(3, 200)
    singular = np.linalg.svd(maps.double().numpy()[:, :, [0, 1, 3, 4]].reshape(200, 4, 2, 2),
                             compute_uv=False)
    assert singular.max() < 1 and np.allclose(singular[..., 0], maps[..., 6], atol=1e-5)
    count = table.amax(1).numpy() + 1
    assert set(count) == {2, 3, 4}
    for s, n in zip(singular, count):
        total = (s[:n, 0] + 2 * s[:n, 1]).sum()
        assert (5 + n) / 2 - 1e-4 <= total <= (6 + n) / 2 + 1e-4
    assert maps[..., [2, 5]].abs().max() <= 1


def test_leaves_have_their_shapes_and_the_first_is_in_front():
    areas = [np.pi, np.pi * (1 - 4 / 9), 3 * 3 ** 0.5 / 4, 4 * 0.98 * 0.14]
    for shape, area in enumerate(areas):
        leaves = [[shape, 100.0, 0.4, 128.0, 128.0], [0, 120.0, 0.0, 128.0, 128.0]]
        drawn = g.draw_leaves(leaves, [[255] * 3, [9] * 3], 256)
        assert abs((drawn == 255).mean() * 256 ** 2 / 100 ** 2 - area) < 0.05 * area + 0.02


def test_flags_change_the_set_and_seeds_repeat_it():
    base, digests = ['--num_images', '40', '--image_size', '16'], {}
    for name, flags in (('a', []), ('easy', ['--difficulty', 'easy']), ('seed', ['--seed', '1']),
                        ('leaves', ['--generator', 'deadleaves']), ('again', [])):
        assert generate(name, *base, *flags) == 0
        digests[name] = json.loads(Path(name, 'meta.json').read_text())['sha256']['images']
    assert len(set(digests.values())) == 4 and digests['a'] == digests['again']
    data = g.read('a', {})
    assert data.kind == 'generated' and (np.bincount(data.labels) == 4).all()
    assert np.allclose(data.images.mean((0, 1, 2)) / 255, data.mean)
    assert np.allclose(data.images.std((0, 1, 2)) / 255, data.std)
    assert generate('xray', *base, '--multilabel', '--num_classes', '14') == 0
    xray = g.read('xray', {})
    labels = g.uniforms(0, g.LABELS, range(20000), 14) < list(g.CHEXPERT.values())
    assert np.allclose(labels.mean(0), list(g.CHEXPERT.values()), atol=0.015)
    assert xray.classes == list(g.CHEXPERT) and xray.labels.shape == (40, 14)
    assert (xray.images == xray.images[..., :1]).all()


@pytest.fixture
def narrow(monkeypatch):
    monkeypatch.setattr(g, 'UNet', functools.partial(g.UNet, emb=32, widths=(16, 16, 16, 16)))


def test_trained_generator_stops_and_goes_on(capsys, narrow):
    folder_of_images('own', size=(8, 8))
    common = ['--generator', 'train', '--source', 'own', '--image_size', '8', '--num_images', '8']
    assert generate('whole', *common, '--generator_steps', '22') == 0
    assert generate('part', *common, '--generator_steps', '20', '--num_images', '10') == 0
    left = Path('part.generator/.checkpoint.pt.tmp')
    left.touch()                                        # of a run that was killed while saving
    assert generate('part/', *common, '--generator_steps', '22', '--force') == 0
    assert not left.exists()
    assert (np.load('whole/images.npy') == np.load('part/images.npy')).all()
    data = g.read('whole', {})
    assert data.classes == ['cat', 'dog'] and (np.bincount(data.labels) == 4).all()
    capsys.readouterr()
    one_line(capsys, generate('part', *common, '--force', '--seed', '1'), 'part.generator')
    assert generate('odd', *common, '--image_size', '17', '--generator_steps', '1') == 0
    Path('part.generator/checkpoint.pt').write_bytes(b'damaged')
    one_line(capsys, generate('part', *common, '--force'), 'damaged')
    with pytest.raises(g.UserError, match='generate_data.py'):
        g.find_or_make('generated', {**g.DEFAULTS, 'generator': 'train', 'source': 'own',
                                     'data_seed': 0})


def test_generator_of_a_set_with_several_labels(narrow):
    flags = ['--num_images', '8', '--num_classes', '3', '--image_size', '8', '--multilabel']
    assert g.main(['--kind', 'noise', '--out', 'labels', *flags]) == 0
    assert generate('made', '--generator', 'train', '--source', 'labels', '--generator_steps', '1',
                    '--num_images', '10') == 0
    rows = {tuple(row) for row in g.read('labels', {}).labels}
    assert {tuple(row) for row in g.read('made', {}).labels} <= rows


def test_flow_is_a_straight_line_between_noise_and_images():
    class Velocity(torch.nn.Module):                    # towards 3, the same for every label
        def forward(self, x, t, y):
            return (3 - x) / (1 - t)[:, None, None, None]
    x = g.sample_flow(Velocity(), torch.randn(5, 3, 8, 8), torch.zeros(5, 3))
    assert torch.allclose(x, torch.full_like(x, 3), atol=1e-4)
