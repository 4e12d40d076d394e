"""Generated images: procedural families, the generator trained here, generators of users."""
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_bad_input import check
from test_data import folder_of_images
from test_scripts import TINY, run_search

import generate_data as g

CPU = torch.device('cpu')
KINDS = [*g.FAMILIES, 'mixed', 'labels']


def procedural(kind, n=40, size=64, **settings):
    labels = g.draw_labels(1, n, 4, 'balanced')
    if kind == 'labels':
        labels, kind = (np.arange(4) < labels[:, None]).astype(np.uint8), 'fractal'
    return g.Procedural(kind, labels, 4, size, 5, **settings)


def generate(out, *flags):
    return g.main(['--kind', 'generated', '--out', out, *flags])


@pytest.mark.parametrize('kind', KINDS)
def test_any_slice_is_the_same_bytes_with_any_number_of_threads(kind):
    images = procedural(kind)
    assert images.chunk < 40                            # more than one chunk, and a last part
    whole = images.images(0, 40)
    assert whole.shape == (40, 64, 64, 3) and whole.dtype == np.uint8
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 2)
    try:
        for start, count in ((0, 1), (7, 20), (39, 1)):
            assert (procedural(kind).images(start, count) == whole[start:start + count]).all()
    finally:
        torch.set_num_threads(threads)
    assert len(np.unique(whole.reshape(40, -1), axis=0)) == 40
    assert whole.std() > 10
    if kind == 'labels':                                # grey; more labels, more that is drawn
        assert (whole == whole[..., :1]).all()


def test_what_is_the_same_on_every_machine():
    numbers = g.uniforms(0, g.DRAWS, 3, 5, 32)
    assert hashlib.sha256(numbers.astype('<f8').tobytes()).hexdigest()[:16] == '895fa71dee0f09cd'
    labels = g.draw_labels(0, 100, 10, 'balanced')
    assert hashlib.sha256(labels.astype('<i8').tobytes()).hexdigest()[:16] == '4adca254f5e7763e'


def test_no_draw_reaches_the_next_class():
    numbers = g.uniforms(534, g.DRAWS, 22557, 1, 32)    # one of them is 1 when rounded to float32
    assert numbers.max() < 1 and numbers.astype(np.float32).max() == 1
    images = g.Procedural('fractal', np.zeros(22558, np.int64), 4, 8, 534)
    assert images.random(22557, 1)[0].max() < 1


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


def test_fields_have_the_slope_that_was_asked_for():
    noise = torch.randn(64, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    for slope in (1.0, 3.0):
        x = g.smooth_field(noise, torch.full((64,), slope))
        assert torch.allclose(x.std((2, 3)), torch.ones(()), atol=1e-4)
        power = torch.fft.fft2(x)[:, 0].abs().square().mean(0)[0, 1:32]     # along one axis
        f = torch.arange(1, 32).log()
        fit = torch.linalg.lstsq(torch.stack([f, torch.ones(31)], 1), power.log()[:, None])
        assert abs(fit.solution[0].item() + slope) < 0.15


def test_flags_and_targets():
    base = ['--num_images', '40', '--image_size', '16']
    sheets = {}
    for name, flags in (('a', []), ('easy', ['--difficulty', 'easy']), ('seed', ['--seed', '1']),
                        ('one', ['--systems_per_class', '1']),
                        ('mixed', ['--generator', 'mixed'])):
        assert generate(name, *base, *flags) == 0
        sheets[name] = json.loads(Path(name, 'meta.json').read_text())['sha256']['images']
    assert len(set(sheets.values())) == 5
    assert generate('b', *base) == 0                    # twice the same
    assert json.loads(Path('b/meta.json').read_text())['sha256']['images'] == sheets['a']
    data = g.read('a')
    assert data.kind == 'generated' and (np.bincount(data.labels) == 4).all()
    assert np.allclose(data.images.mean((0, 1, 2)) / 255, data.mean)
    assert np.allclose(data.images.std((0, 1, 2)) / 255, data.std)
    assert generate('xray', '--like', 'chexpert', '--num_images', '20', '--image_size', '32') == 0
    xray = g.read('xray')
    assert xray.classes == list(g.CHEXPERT) and xray.labels.shape == (20, 14)
    assert (xray.images == xray.images[..., :1]).all()
    many = g.main(['--kind', 'generated', '--like', 'imagenet', '--num_images', '1000', '--out',
                   'many', '--image_size', '8'])
    assert many == 0 and len(g.read('many').classes) == 1000
    assert generate('hundred', '--like', 'cifar100', '--num_images', '100') == 0
    assert g.read('hundred').labels.max() == 99
    assert generate('tree', '--num_images', '20', '--format', 'folder') == 0
    assert len(g.read('tree')) == 20


def test_prevalences_are_those_of_chexpert():
    labels = g.uniforms(0, g.LABELS, 0, 20000, 14) < list(g.CHEXPERT.values())
    assert np.allclose(labels.mean(0), list(g.CHEXPERT.values()), atol=0.015)


def test_killed_in_the_middle_nothing_is_left_under_the_name():
    command = [sys.executable, str(ROOT / 'generate_data.py'), '--kind', 'generated', '--out', 'k',
               '--image_size', '32', '--num_images']
    with subprocess.Popen([*command, '1000000'], start_new_session=True) as run:
        while not list(Path('.').glob('.k.tmp*/images.npy')):
            assert run.poll() is None
            time.sleep(0.05)
        os.kill(run.pid, signal.SIGKILL)
    assert not Path('k').exists()
    assert subprocess.run([*command, '20']).returncode == 0
    assert sorted(p.name for p in Path('.').iterdir()) == ['k']


def test_probe_says_how_learnable_a_set_is(capsys):
    flags = ['--num_classes', '4', '--num_images', '1200', '--image_size', '16', '--probe']
    found = {}
    for name, kind in (('s', ['--kind', 'generated', '--generator', 'spectrum']),
                       ('n', ['--kind', 'noise'])):
        assert g.main([*kind, '--out', name, *flags]) == 0
        found[name] = json.loads(Path(name, 'meta.json').read_text())['probe']
        assert f'probe {found[name]["network"]:.1f}%' in capsys.readouterr().out
    assert found['s']['network'] > 60 > 45 > found['n']['network']
    assert found['s']['network'] > found['s']['nearest_neighbour'] + 10
    assert found['n'].keys() == {'network', 'nearest_neighbour', 'measure', 'n_train', 'n_test'}
    assert found['n']['n_test'] == pytest.approx(120, abs=4)
    check(capsys, g.main(['--kind', 'noise', '--out', 'm', '--multilabel', '--num_images', '10',
                          '--num_classes', '4', '--image_size', '8', '--probe']), '--probe')
    assert not Path('m').exists()


def test_area_under_the_curve():
    labels = np.array([[0, 1], [1, 1], [1, 1], [0, 1]], np.uint8)
    g.write_set('x', {'kind': 'noise', 'classes': ['a', 'b'], 'image_size': 8, 'seed': 0,
                      'mean': [0.5] * 3, 'std': [0.2] * 3}, labels,
                [np.zeros((4, 8, 8, 3), np.uint8)])
    scores = torch.tensor([[0.1, 0], [0.8, 0], [0.1, 0], [0.05, 0]])
    assert g.grade(lambda x: scores, g.read('x'), range(4), CPU) == pytest.approx(87.5)


def test_trained_generator_learns_stops_and_goes_on(capsys):
    folder_of_images('own', n=12, size=(8, 8))
    common = ['--generator', 'train', '--source', 'own', '--image_size', '8', '--num_images', '24']
    assert generate('whole', *common, '--generator_steps', '40', '--probe') == 0
    said = capsys.readouterr().out
    assert 'train on generated, test on real' in said
    assert {'generated_to_real', 'real_to_generated'} <= set(
        json.loads(Path('whole/meta.json').read_text())['probe'])
    assert generate('part', *common, '--generator_steps', '20', '--num_images', '10') == 0
    assert len(Path('part.generator/log.jsonl').read_text().splitlines()) == 1
    assert generate('part/', *common, '--generator_steps', '40', '--force') == 0
    states = [torch.load(f'{name}.generator/generator.pt', weights_only=True)
              for name in ('whole', 'part')]
    assert all(torch.equal(a, b) for a, b in zip(*(s['average'].values() for s in states)))
    losses = [[json.loads(line)['loss'] for line in
               Path(f'{name}.generator/log.jsonl').read_text().splitlines()]
              for name in ('whole', 'part')]
    assert losses[0] == losses[1] and losses[0][-1] < losses[0][0]
    images = [np.load(f'{name}/images.npy') for name in ('whole', 'part')]
    assert (images[0] == images[1]).all()
    # Sampled again from its file; and a limit of time ends the training early.
    assert generate('again', '--generator', 'whole.generator/generator.pt', '--num_images',
                    '24') == 0
    assert (np.load('again/images.npy') == images[0]).all()
    assert g.read('again').classes == ['cat', 'dog']
    assert generate('short', *common, '--time_limit', '1e-6', '--num_images', '10') == 0
    assert states[0]['step'] == 40
    assert torch.load('short.generator/generator.pt', weights_only=True)['step'] == 20
    capsys.readouterr()
    check(capsys, generate('part', *common, '--force', '--seed', '1'), 'part.generator')
    check(capsys, generate('odd', *common[:-2], '--image_size', '17'), '17 px')
    check(capsys, generate('odd', '--generator', 'whole.generator/generator.pt', '--num_images',
                           '24', '--image_size', '16'), 'draws 8 px')
    g.write_random_labels('other', g.read('own', image_size=8), 7)
    g.write_random_labels('others', g.read('own', image_size=8), 8)
    flags = ['--generator', 'train', '--generator_steps', '1', '--num_images', '10', '--force']
    assert generate('odd', *flags, '--source', 'other') == 0
    capsys.readouterr()
    check(capsys, generate('odd', *flags, '--source', 'others'), 'labels')
    Path('mine').mkdir()
    Path('mine/letter').write_text('dear')
    check(capsys, generate('mine', *common, '--force'), 'no data set of ours')
    assert not Path('mine.generator').exists()


def test_generator_of_a_set_with_several_labels():
    g.write_noise('labels', 40, 3, 8, 0, multilabel=True)
    assert generate('made', '--generator', 'train', '--source', 'labels', '--generator_steps', '1',
                    '--num_images', '10') == 0
    rows = {tuple(row) for row in g.read('labels').labels}
    assert {tuple(row) for row in g.read('made').labels} <= rows


class Conditional(torch.nn.Module):
    """What the contract asks for: z (64, 6), y (64,) or (64, 3) -> images (64, C, H, W)."""
    def __init__(self, channels=3, low=-1.0, onehot=False, conditional=True, bad=None, wide=9):
        super().__init__()
        self.colour = torch.nn.Parameter(
            torch.tensor([[0.0], [0.5], [1.0]]).repeat(1, channels))
        self.channels, self.low, self.onehot, self.bad = channels, low, onehot, bad
        self.conditional, self.wide = conditional, wide

    def forward(self, z, y):
        colour = y @ self.colour if self.onehot else self.colour[y]
        x = torch.sigmoid(z[:, :6].mean(1)[:, None] + 4 * (colour if self.conditional else 0.5) - 2)
        x = self.low + (1 - self.low) * x
        x = x[:, :, None, None].expand(-1, -1, 8, self.wide) + 0 * z[:, 5:6, None, None]
        return x / 0 if self.bad == 'nan' else x[:, 0] if self.bad == 'shape' else x


def export(path, **settings):
    network = Conditional(**settings)
    y = torch.zeros(64, dtype=torch.int64) if not network.onehot else torch.zeros(64, 3)
    torch.export.save(torch.export.export(network, (torch.zeros(64, 6), y)), path)


USER = ['--num_classes', '3', '--num_images', '70', '--image_size', '8', '--z_dim', '6',
        '--trust_generator']


def test_generators_of_users():
    export('rgb.pt2')
    assert generate('rgb', '--generator', 'rgb.pt2', *USER) == 0
    data = g.read('rgb')
    assert data.images.shape == (70, 8, 8, 3) and sorted(np.bincount(data.labels)) == [23, 23, 24]
    means = [data.images[data.labels == k].mean() for k in range(3)]
    assert max(means) - min(means) > 5                              # the label makes the image
    export('grey.pt2', channels=1, low=0.0, onehot=True)
    flags = ['--generator', 'grey.pt2', *USER, '--label_input', 'onehot', '--output_range', '0,1']
    assert generate('grey', *flags) == 0
    assert (g.read('grey').images == g.read('grey').images[..., :1]).all()
    seen = {np.load('grey/images.npy').tobytes()}
    for name, extra in (('u', ['--z_dist', 'uniform']), ('t', ['--z_dist', 'truncnorm']),
                        ('h', ['--truncation', '0.5']), ('s', ['--seed', '1'])):
        assert generate(name, *flags, *extra) == 0
        seen.add(np.load(f'{name}/images.npy').tobytes())
    assert len(seen) == 5
    Path('code.py').write_text('from test_generated import Conditional as make\n')
    torch.save(Conditional().state_dict(), 'state.pt')
    assert generate('code', '--generator', 'state.pt', '--generator_code', 'code.py:make',
                    *USER) == 0


def test_latents_have_their_distributions():
    for dist, std, top in (('normal', 1, 6), ('uniform', 3 ** -0.5, 1), ('truncnorm', 0.88, 2)):
        z = g.latents(0, 0, 500, 40, dist)
        assert abs(z.std() - std) < 0.02 and z.abs().max() <= top and abs(z.mean()) < 0.02
        assert torch.equal(g.latents(0, 7, 2, 40, dist), z[7:9])
        assert torch.allclose(g.latents(0, 0, 500, 40, dist, 0.5), z / 2)


@pytest.mark.parametrize('settings, flags, needle', [
    ({}, ['--z_dim', '4'], 'z_dim'),
    ({}, ['--num_classes', '5'], 'num_classes'),
    ({}, ['--output_range', '0,1'], 'output_range'),
    ({'low': 0.0}, ['--output_range', '0,255'], 'output_range'),
    ({'bad': 'nan'}, [], 'not finite'),
    ({'bad': 'shape'}, [], 'N x C x H x W'),
    ({'conditional': False}, [], 'whatever the label'),
    ({}, ['--label_input', 'onehot'], 'label_input'),
    ({}, ['--generator', 'nowhere.pt2'], 'nowhere.pt2'),
    ({}, ['--generator', 'fractl'], 'fractl'),
    ({}, ['--generator', 'garbage.pt2'], 'garbage.pt2'),
    ({}, ['--generator', 'garbage.pt'], 'means nothing'),
    ({}, ['--generator_code', 'nocode.py:make'], 'nocode.py'),
    ({}, ['--difficulty', 'easy'], 'difficulty'),
])
def test_a_generator_that_does_not_fit_is_one_line(settings, flags, needle, capsys):
    export('own.pt2', **settings)
    Path('garbage.pt2').write_bytes(b'garbage')
    Path('garbage.pt').write_bytes(b'garbage')
    before = sorted(Path('.').iterdir())
    capsys.readouterr()
    check(capsys, generate('x', '--generator', 'own.pt2', *USER, *flags), needle)
    assert sorted(Path('.').iterdir()) == before


def test_a_program_is_not_opened_without_trust(capsys):
    Path('evil.pt2').write_bytes(b'')
    Path('evil.py').write_text('open("opened", "w")')
    check(capsys, generate('x', '--generator', 'evil.pt2'), '--trust_generator')
    check(capsys, generate('x', '--generator', 'evil.pt2', '--generator_code', 'evil.py:make'),
          '--trust_generator')
    assert not Path('opened').exists()
    Path('evil.pt').write_bytes(b'garbage')
    check(capsys, generate('x', '--generator', 'evil.pt'), 'evil.pt')


@pytest.mark.parametrize('family', [*g.FAMILIES, 'mixed'])
def test_search_makes_what_is_missing(family):
    run_search('r', '--data', 'generated', '--generator', family, '--difficulty', 'easy')
    assert len(list(Path('data').glob(f'generated-{family}-easy-64x8px-*'))) == 1


def test_search_on_generated_labels_and_what_it_refuses(capsys):
    run_search('r', '--data', 'generated', '--multilabel', '--systems_per_class', '2')
    assert len(list(Path('data').glob('generated-*-systems2-multilabel-*'))) == 1
    import search
    capsys.readouterr()
    check(capsys, search.main([*TINY, '--data', 'generated', '--generator', 'train']),
          'generate_data.py')
    check(capsys, search.main([*TINY, '--data', 'noise', '--difficulty', 'easy']), 'difficulty')
