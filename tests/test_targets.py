"""ImageNet and CheXpert: their layouts, presets, augmentation and metrics, at tiny size."""
import csv
import json
import os
from pathlib import Path

import evaluate
import generate_data as g
import numpy as np
import pytest
import retrain
import search
import torch
from conftest import ROOT
from PIL import Image
from torchvision.transforms import RandomResizedCrop

CPU = torch.device('cpu')
TINY = ['--layers', '3', '--init_channels', '4', '--batch_size', '4', '--epochs', '2',
        '--steps_per_epoch', '2', '--gpu', '-1']


def message(capsys, status):
    captured = capsys.readouterr()
    assert status == 2 and captured.err.strip().splitlines()[-1].count('error: ') == 1
    return captured.err.strip().splitlines()[-1]


# ---------------------------------------------------------------------------------------------
# ImageNet


def tree(root, classes=('n01', 'n02', 'n03'), train=8, val=2, size=(80, 72)):
    rng = np.random.default_rng(0)
    for split, n in (('train', train), ('val', val)):
        for name in classes:
            folder = Path(root, split, name)
            folder.mkdir(parents=True)
            for k in range(n):
                pixels = rng.integers(0, 256, (size[1] // 8, size[0] // 8, 3), np.uint8)
                Image.fromarray(pixels).resize(size).save(folder / f'{name}_{k}.JPEG')
    return root


def test_imagenet_tree_is_read_as_it_lies_on_disk(capsys):
    tree('in')
    red = Image.new('RGB', (90, 90), (200, 10, 10))
    red.convert('CMYK').save('in/val/n01/cmyk.JPEG', 'JPEG')
    red.save('in/val/n01/disguised.JPEG', 'PNG')
    red.convert('L').save('in/val/n01/grey.JPEG', 'JPEG')
    where = {'data_dir': 'in', 'image_size': 64}
    train, test = (g.read('imagenet', where, split) for split in ('train', 'test'))
    assert train.classes == ['n01', 'n02', 'n03'] and len(train) == 24 and len(test) == 9
    assert train.mean == [0.485, 0.456, 0.406]
    assert not g.read('imagenet', {'data_dir': 'in'}).resident
    cmyk, disguised, grey = test.get(range(3)).astype(int)
    assert abs(cmyk - (200, 10, 10)).max() < 12 and (disguised == (200, 10, 10)).all()
    assert (grey == grey[0, 0, 0]).all()
    Path('in/train/n02/n02_3.JPEG').write_bytes(b'not an image')
    flags = [*TINY, '--data', 'imagenet', '--data_dir', 'in', '--image_size', '72', '--save', 'r']
    flags += ['--train_fraction', '0.5', '--valid_fraction', '0.5', '--warmup_epochs', '0',
              '--frozen_epochs', '0']
    assert 'n02_3.JPEG' in message(capsys, search.main([*flags, '--steps_per_epoch', '3']))
    Path('in/val/n04').mkdir()
    assert 'n04' in message(capsys, search.main(flags))
    assert 'train/' in message(capsys, search.main([*flags, '--data_dir', 'nowhere']))


def test_search_retrain_and_evaluate_on_images_of_many_pixels(capsys):
    tree('in')
    flags = [*TINY, '--data', 'imagenet', '--data_dir', 'in', '--image_size', '72']
    assert search.main([*flags, '--method', 'pcdarts', '--save', 'r', '--train_fraction', '0.6',
                        '--valid_fraction', '0.4', '--warmup_epochs', '1', '--workers', '1',
                        '--frozen_epochs', '0']) == 0
    assert retrain.main([*flags, '--arch', 'r', '--save', 'n', '--ema', '0.9',
                         '--warmup_epochs', '1']) == 0
    capsys.readouterr()
    assert evaluate.main(['n', '--gpu', '-1', '--json']) == 0
    row = json.loads(capsys.readouterr().out)
    last = json.loads(Path('n/log.jsonl').read_text().splitlines()[-1])
    assert row['test_error'] == last['test_error'] and row['test_images'] == 6
    network, meta = evaluate.load_weights('n/weights.pt')
    assert meta['stem'] == 'imagenet' and network.stem1 is not None
    state = torch.load('n/checkpoint.pt', weights_only=True)    # what is kept is the average
    assert torch.equal(network.classifier.weight, state['average']['module.classifier.weight'])
    assert not torch.equal(network.classifier.weight, state['network']['classifier.weight'])


def test_random_labels_of_a_tree_and_unreal_data_at_that_size():
    tree('in')
    flags = [*TINY, '--image_size', '72', '--warmup_epochs', '0', '--frozen_epochs', '0']
    assert search.main([*flags, '--data', 'random_labels', '--source', 'imagenet', '--data_dir',
                        'in', '--save', 'a', '--train_fraction', '0.5', '--valid_fraction',
                        '0.5']) == 0
    for name in ('noise', 'generated'):
        assert search.main([*flags, '--data', name, '--preset', 'imagenet', '--num_classes', '3',
                            '--num_images', '60', '--save', name]) == 0
        assert json.loads(Path(name, 'args.json').read_text())['settings']['train_portion'] == 0.8


def test_published_counts(capsys):
    assert evaluate.main(['--arch', 'DARTS_V2', '--cost', '--image_size', '224', '--json',
                          '--init_channels', '48', '--layers', '14', '--num_classes', '1000']) == 0
    counts = json.loads(capsys.readouterr().out)
    assert counts['params'] == 4718752 and counts['params_auxiliary'] == 5979528
    assert round(counts['multiply_adds'] / 1e6, 1) == 529.9


def test_the_most_channels_that_fit():
    genotype = evaluate.PUBLISHED['DARTS_V2']
    c = evaluate.widest(genotype, 600e6, 14, 1000, 224, 'imagenet')
    adds = [evaluate.cost(genotype, k, 14, 1000, 224, 'imagenet')['multiply_adds']
            for k in (c, c + 1)]
    assert adds[0] <= 600e6 < adds[1]
    assert retrain.main([*TINY[:2], *TINY[4:], '--arch', 'DARTS_V2', '--data', 'noise',
                         '--image_size', '8', '--num_images', '64', '--max_multiply_adds', '1e5',
                         '--save', 'm']) == 0
    channels = json.loads(Path('m/args.json').read_text())['settings']['init_channels']
    assert channels == evaluate.widest(genotype, 1e5, 3, 10, 8, 'cifar') != 36


def test_presets():
    args = search.parse(['--data', 'imagenet', '--method', 'pcdarts'])
    assert (args.batch_size, args.learning_rate, args.arch_learning_rate, args.warmup_epochs,
            args.frozen_epochs, args.partial, args.train_portion, args.valid_fraction,
            args.image_size) == (1024, 0.5, 6e-3, 5, 35, 2, 0.1, 0.025, 224)
    assert search.parse(['--data', 'imagenet', '--batch_size', '512']).learning_rate == 0.25
    assert search.parse(['--data', 'imagenet', '--learning_rate', '0.3', '--batch_size',
                         '512']).learning_rate == 0.3
    noise = search.parse(['--preset', 'imagenet'])
    assert (noise.num_classes, noise.image_size, noise.train_portion) == (1000, 224, 0.8)
    g.write_noise('set', 40, 4, 8, 0)
    for data, share in (('noise', 0.8), ('generated', 0.8), ('set', 0.8), ('imagenet', 0.1)):
        assert search.parse(['--data', data, '--preset', 'imagenet']).train_portion == share
    assert search.parse(['--data', 'random_labels', '--source', 'chexpert']).image_size == 224
    args = retrain.parse(['--arch', 'DARTS_V2', '--data', 'imagenet'])
    assert (args.epochs, args.batch_size, args.learning_rate, args.schedule, args.warmup_epochs,
            args.weight_decay, args.label_smoothing, args.init_channels, args.layers) == (
        250, 1024, 0.5, 'linear', 5, 3e-5, 0.1, 48, 14)
    args = retrain.parse(['--arch', 'DARTS_V2', '--data', 'chexpert'])
    assert (args.optimizer, args.learning_rate, args.image_size, args.holdout_patients) == (
        'adam', 1e-4, 320, 0.02)


def test_shares_that_are_given_win_over_quick_and_presets(capsys):
    assert search.parse(['--quick', '--train_portion', '0.3']).train_portion == 0.3
    args = search.parse(['--data', 'imagenet', '--train_fraction', '0.3'])
    assert (args.train_portion, args.valid_fraction) == (0.3, 0.025)
    assert 'more than all' in message(capsys, search.main([
        '--train_fraction', '0.8', '--valid_fraction', '0.3']))


def test_learning_rate_rises_then_falls():
    args = retrain.parse(['--arch', 'DARTS_V2', '--data', 'imagenet', '--epochs', '10'])
    rates = [evaluate.learning_rate_at(args, e, 10) for e in range(10)]
    assert np.allclose(rates, [.1, .2, .3, .4, .5, .5, .4, .3, .2, .1])
    args = search.parse(['--epochs', '4'])
    assert np.allclose([evaluate.learning_rate_at(args, e, 4) for e in range(4)],
                       0.001 + 0.024 * (1 + np.cos(np.pi * np.arange(4) / 4)) / 2)


def test_fractions_of_each_class_and_no_image_twice():
    labels = np.repeat(np.arange(5), 40)
    data = g.Data('x', 'real', None, labels, list('abcde'), None, None, 32, {})
    first, second = search.two_parts(data, search.parse(
        ['--train_fraction', '0.1', '--valid_fraction', '0.025', '--seed', '1']))
    assert (np.bincount(labels[first]) == 4).all() and (np.bincount(labels[second]) >= 1).all()
    assert not set(first) & set(second) and len(second) <= 10


@pytest.mark.parametrize('size, flags', [(28, []), (192, ['--auxiliary'])])
def test_sizes_that_are_too_small_for_the_stem(size, flags, capsys):
    command = [*TINY, '--arch', 'DARTS_V2', '--data', 'noise', '--num_images', '16', *flags]
    assert str(size) in message(capsys, retrain.main([
        *command, '--image_size', str(size), '--stem', 'imagenet']))


def test_crops_are_those_of_random_resized_crop():
    """The crop of torchvision from a ramp: its middle tells where it lies, its range how large."""
    ramp = np.zeros((400, 600, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.linspace(0, 255, 600), np.linspace(0, 255, 400)[:, None]
    Image.fromarray(ramp).save('ramp.png')
    for seed in range(30):
        torch.manual_seed(seed)
        x = g.read_image('ramp.png', 16, 8 / 7, crop=True).astype(int)
        torch.manual_seed(seed)
        top, left, height, width = RandomResizedCrop.get_params(
            torch.zeros(1, 400, 600), (0.08, 1), (3 / 4, 4 / 3))
        for channel, start, length, side in ((0, left, width, 600), (1, top, height, 400)):
            assert abs(x[..., channel].mean() / 255 - (start + length / 2) / side) < 0.01
            assert abs(np.ptp(x[..., channel]) / 255 - length / side) < 0.1


def test_augmentations_keep_what_they_should():
    pixels = np.zeros((6, 72, 72, 3), np.uint8)
    pixels[:, :, :36] = 255                                         # left half white
    data = g.Data('x', 'real', pixels, np.zeros((6, 14), np.uint8), list(g.CHEXPERT), [.5] * 3,
                  [.2] * 3, 72, {})
    sides = {}
    for augment in ('affine', 'crop'):
        batches = g.Batches(data, range(6), 6, CPU, augment, workers=0)
        x = torch.cat([next(batches.epoch(k))[0] for k in range(4)])
        sides[augment] = x[:, 0, :, 10:26].mean((1, 2)) > x[:, 0, :, 46:62].mean((1, 2))
        assert (x.std(0) > 0).any()
    assert sides['affine'].all() and 3 < sides['crop'].sum() < 21


# ---------------------------------------------------------------------------------------------
# CheXpert

COLUMNS = ['Path', 'Sex', 'Age', 'Frontal/Lateral', 'AP/PA', *g.CHEXPERT]


def write_rows(path, rows, columns=COLUMNS):
    with open(path, 'w', newline='') as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def chest(root, layout='CheXpert-v1.0-small', prefix=None, patients=12, columns=COLUMNS):
    """Patients with a frontal and a lateral view; every label now and then, -1.0 made up."""
    rng, splits = np.random.default_rng(0), {'train': [], 'valid': []}
    for p in range(patients + 6):
        split = 'train' if p < patients else 'valid'
        study = f'patient{p:05d}/study1'
        if 'batch' in layout:
            folder = Path(root, 'CheXpert-v1.0 batch 1 (validate & csv)/valid', study) \
                if split == 'valid' else Path(root, f'CheXpert-v1.0 batch {2 + p % 2} (train '
                                              f'{1 + p % 2})', study)
        else:
            folder = Path(root, layout, split, study)
        folder.mkdir(parents=True)
        cells = {name: ['', '1.0', '0.0', '-1.0' if split == 'train' else '1.0'][(p + k) % 4]
                 for k, name in enumerate(g.CHEXPERT)}
        cells['Fracture'] = ''
        for view in ('view1_frontal', 'view2_lateral'):
            pixels = rng.integers(0, 256, (6, 5), np.uint8)
            Image.fromarray(pixels).resize((20, 24)).save(folder / f'{view}.jpg')
            splits[split].append({
                'Path': f'{prefix or layout}/{split}/{study}/{view}.jpg', 'Sex': 'Male', 'Age': 5,
                'Frontal/Lateral': view[6:].title(), 'AP/PA': 'PA', **cells})
    for split, rows in splits.items():
        write_rows(Path(root, layout, f'{split}.csv'), rows, columns)
    return root


@pytest.mark.parametrize('layout, prefix, inside', [
    ('CheXpert-v1.0-small', None, ''), ('CheXpert-v1.0', 'CheXpert-v1.0-small', ''),
    ('CheXpert-v1.0', '/mnt/other/CheXpert-v1.0', 'CheXpert-v1.0'),
    ('CheXpert-v1.0 batch 1 (validate & csv)', 'CheXpert-v1.0', '')])
def test_chexpert_layouts(layout, prefix, inside):
    chest('d', layout, prefix, columns=COLUMNS[::-1])
    where = {'data_dir': str(Path('d', inside)), 'image_size': 16}
    train, valid = (g.read('chexpert', where, split) for split in ('train', 'test'))
    assert len(train) == 12 and len(valid) == 6 and train.classes == list(g.CHEXPERT)
    assert train.images.shape == (12, 16, 16, 3) and train.studies[3] == 'patient00003/study1'
    assert len(g.read('chexpert', {**where, 'views': 'all'})) == 24
    assert (train.mean, train.std) == (valid.mean, valid.std)
    Path('d/CheXpert-v1.0 batch 2 (train 1).zip').touch()           # kept beside its folder
    assert len(g.read('chexpert', where)) == 12
    names, s = [], {name: setting.default for name, setting in g.DATA.items()}
    for policy in ('ones', 'zeros'):
        data = g.find_or_make('random_labels', {
            **s, **where, 'source': 'chexpert', 'uncertain': policy, 'label_mode': 'permute',
            'data_seed': 0})
        names.append(data.name)
    assert names[0] != names[1]


@pytest.mark.parametrize('policy, other, atelectasis', [
    ('mixed', 0, 1), ('ones', 1, 1), ('zeros', 0, 0), ('ignore', -1, -1)])
def test_uncertain_labels(policy, other, atelectasis):
    chest('d')
    labels = g.read('chexpert', {'data_dir': 'd', 'image_size': 16, 'uncertain': policy}).labels
    names = list(g.CHEXPERT)
    for k, expected in ((names.index('Pneumonia'), other),
                        (names.index('Atelectasis'), atelectasis)):
        cells = np.array([(p + k) % 4 for p in range(12)])
        assert (labels[cells == 3, k] == expected).all()
        assert (labels[cells == 1, k] == 1).all() and (labels[cells % 2 == 0, k] == 0).all()


def test_unknown_labels_add_nothing_to_the_loss():
    logits, y = torch.randn(3, 4, requires_grad=True), torch.tensor([[0., 1, -1, 1]] * 3)
    evaluate.loss_of(logits, y).backward()
    assert (logits.grad[:, 2] == 0).all() and (logits.grad[:, [0, 1, 3]] != 0).all()


def test_label_smoothing():
    logits, y = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 0])
    smooth = 0.9 * torch.eye(4)[y] + 0.1 / 4
    wanted = -(smooth * logits.log_softmax(1)).sum(1).mean()
    assert torch.allclose(evaluate.loss_of(logits, y, 0.1), wanted)


def test_no_patient_is_in_both_halves():
    chest('d', patients=20)
    data = g.read('chexpert', {'data_dir': 'd', 'image_size': 16, 'views': 'all'})
    first, second = search.two_parts(data, search.parse(['--seed', '2']))
    assert len(first) == len(second) == 20
    assert not set(data.patients[first]) & set(data.patients[second])


def test_search_retrain_evaluate_on_chest_x_rays(capsys, monkeypatch):
    chest('d', patients=40)
    flags = [*TINY, '--data', 'chexpert', '--data_dir', 'd', '--image_size', '16']
    assert search.main([*flags, '--save', 'r', '--train_fraction', '0.5', '--valid_fraction',
                        '0.5']) == 0
    assert search.main([*TINY, '--data', 'random_labels', '--source', 'chexpert', '--label_mode',
                        'permute', '--data_dir', 'd', '--image_size', '16', '--save', 'q',
                        '--train_fraction', '0.5', '--valid_fraction', '0.5']) == 0
    assert retrain.main([*flags, '--arch', 'r', '--save', 'n', '--holdout_patients', '0.2',
                         '--train_portion', '0.9', '--uncertain', 'ignore', '--views', 'all']) == 0
    assert 'several labels' in message(capsys, retrain.main([
        *flags, '--arch', 'r', '--label_smoothing', '0.1', '--save', 'smooth']))
    lines = [json.loads(line) for line in Path('n/log.jsonl').read_text().splitlines()]
    assert all(0 <= line['holdout_auroc'] <= 1 and 0 <= line['test_auroc'] <= 1 for line in lines)
    capsys.readouterr()
    assert evaluate.main(['n', '--gpu', '-1', '--json']) == 0
    row = json.loads(capsys.readouterr().out)
    best = max(lines, key=lambda line: line['holdout_auroc'])
    assert abs(row['auroc_tasks'] - best['test_auroc']) < 1e-9
    assert row['undefined'] == ['Fracture'] and row['test_studies'] == 6
    assert row['auroc_tasks_interval'][0] <= row['auroc_tasks'] <= row['auroc_tasks_interval'][1]
    assert evaluate.main(['n', '--gpu', '-1', '--json', '--view_pooling', 'mean']) == 0
    assert json.loads(capsys.readouterr().out)['auroc'] != row['auroc']
    # Under torchrun scores come in another order, with their rows.
    in_order = evaluate.test

    def by_process(network, batches):
        score = in_order(network, batches)
        order = np.argsort(score['rows'] % 2, kind='stable')
        return {**score, **{k: score[k][order] for k in ('rows', 'scores')}}
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, 'test', by_process)
        assert evaluate.main(['n', '--gpu', '-1', '--json']) == 0
    assert json.loads(capsys.readouterr().out)['auroc'] == row['auroc']
    # Labels of the test set: by study, its images in test/ beside them.
    os.rename('d/CheXpert-v1.0-small/valid', 'd/test')
    with open('d/CheXpert-v1.0-small/valid.csv') as file:
        rows = {row['Path'].rsplit('/', 1)[0].replace('valid', 'test'): row
                for row in csv.DictReader(file)}
    write_rows('d/labels.csv', [{'Study': study, **{k: r[k] for k in g.CHEXPERT}}
                                for study, r in rows.items()], ['Study', *g.CHEXPERT])
    assert evaluate.main(['n', '--gpu', '-1', '--json', '--test_labels', 'd/labels.csv']) == 0
    again = json.loads(capsys.readouterr().out)
    assert again['auroc'] == row['auroc'] and again['tested_on'] == 'd/labels.csv'
    assert evaluate.main(['n', '--gpu', '-1', '--test_labels', 'd/labels.csv']) == 0
    assert 'bootstrap' in capsys.readouterr().out


def test_bad_chexpert(capsys):
    def run(*more):
        return message(capsys, search.main([*TINY, '--data', 'chexpert', '--data_dir', 'd',
                                            '--image_size', '16', *more]))
    assert 'train.csv' in run() and 'train.csv' in run('--data_dir', 'nowhere')
    chest('d')
    table = Path('d/CheXpert-v1.0-small/train.csv')
    whole = table.read_text()
    table.write_text(whole.replace('Edema', 'Oedema'))
    assert 'Edema' in run()
    table.write_text(whole.replace('-1.0', '-2.0', 1))
    assert 'line' in run() and '-2.0' in run()
    table.write_text(','.join(whole.split(',')[:-3]))               # cut in its last line
    assert 'None' in run()
    table.write_text(whole.splitlines()[0] + '\n')
    assert 'no rows' in run()
    table.write_bytes(b'\xff\xfe\x00')
    assert 'CSV' in run()
    table.write_text(whole.replace('patient0000', 'patient9990'))
    assert 'looked at' in run()
    table.write_text(whole)
    lost = Path('d/CheXpert-v1.0-small/train/patient00007/study1/view1_frontal.jpg')
    lost.rename('d/kept.jpg')
    assert 'patient00007' in run()
    Path('d/kept.jpg').rename(lost)
    valid = Path('d/CheXpert-v1.0-small/valid.csv')
    valid.write_text(valid.read_text().replace('valid/patient00013', 'valid/patient00003'))
    g.read('chexpert', {'data_dir': 'd', 'image_size': 16})
    assert 'patient00003' in capsys.readouterr().err
    assert 'uncertain' in message(capsys, search.main([*TINY, '--uncertain', 'ones']))


def test_auroc_by_hand_and_by_scikit_learn():
    # Pairs of a positive and a negative: 3 x 2; won 3, tied 2, lost 1.
    scores, labels = np.array([.9, .5, .3, .5, .3]), np.array([1, 1, 1, 0, 0]) == 1
    assert g.auroc(scores, labels) == (2 + 1.5 + 0.5) / 6
    assert g.auroc(scores, labels & False) is None
    metrics = pytest.importorskip('sklearn.metrics')
    rng = np.random.default_rng(0)
    scores, labels = rng.integers(0, 9, 500) / 9, rng.random(500) < 0.3
    assert abs(g.auroc(scores, labels) - metrics.roc_auc_score(labels, scores)) < 1e-12


def test_studies_intervals_and_undefined_labels():
    studies = np.array(['a', 'b', 'a', 'c'])
    scores, labels = np.array([[1.], [5], [3], [2]]), np.array([[0], [-1], [1], [0]])
    pooled, known = evaluate.by_study(scores, labels, studies)
    assert pooled.T.tolist() == [[3, 5, 2]] and known.T.tolist() == [[1, -1, 0]]
    assert evaluate.by_study(scores, labels, studies, 'mean')[0].T.tolist() == [[2, 5, 2]]
    rng = np.random.default_rng(0)
    labels = (rng.random((300, 3)) < 0.4).astype(int)
    scores = labels + rng.normal(0, 1, labels.shape)
    labels[:, 2] = 0
    out = evaluate.areas(scores, labels, ['Edema', 'x', 'y'], 200)
    assert out['undefined'] == ['y'] and out['auroc_tasks'] == out['auroc']['Edema']
    low, high = out['auroc_tasks_interval']
    assert low < out['auroc_tasks'] < high and 0.04 < high - low < 0.15      # about .76 +- .03


def test_real_files(capsys):
    """The README's commands on real ImageNet and X-ray files, where they are at hand."""
    data = Path(os.environ.get('UNREALNAS_DATA', ROOT / 'data'))
    if not (data / 'tiny-imagenet-20').is_dir() or not (data / 'CheXpert-v1.0-small').is_dir():
        pytest.skip('no real files in data/')
    flags = ['--quick', '--max_steps', '3', '--gpu', '-1']
    for k, more in enumerate((['imagenet', '--data_dir', str(data / 'tiny-imagenet-20')],
                              ['chexpert', '--data_dir', str(data), '--image_size', '64'])):
        assert search.main([*flags, '--data', *more, '--save', f's{k}']) == 0
        assert retrain.main([*flags, '--data', *more, '--arch', f's{k}', '--save', f'n{k}']) == 0
        assert evaluate.main([f'n{k}', '--gpu', '-1']) == 0
        said = capsys.readouterr().out
        assert ('auroc_tasks' in said) == bool(k) and ('test_error' in said) != bool(k)
