"""ImageNet and CheXpert: searches and retrainings on files laid out as theirs; published numbers.

How these data are read and augmented is in test_readers.py.
"""
import os

import numpy as np
import pytest
import torch
from conftest import (COLUMNS, SIZES, chexpert, imagenet, make_set, one_line, read_rows,
                      reports, run, write_rows)

import evaluate
import generate_data
import retrain
import search
from genotypes import random_string


def test_search_retrain_and_evaluate_on_imagenet(capsys):
    imagenet('in')
    flags = [*SIZES, '--batch_size', '4', '--data', 'imagenet', '--data_dir', 'in', '--image_size',
             '72', '--warmup_epochs', '1']
    lines = run(search.main, 'r', *flags, '--method', 'pcdarts', '--train_portion', '0.6',
                '--valid_fraction', '0.4', '--workers', '1', '--frozen_epochs', '0')
    assert lines[-1]['genotype'] and lines[0]['learning_rate'] == pytest.approx(0.5 * 4 / 1024)
    lines = run(retrain.main, 'n', *flags, '--arch', 'r')
    row, = reports(capsys, 'n')
    assert row['test_error'] == lines[-1]['test_error'] and row['test_n'] == 6
    assert row['gap'] == pytest.approx(row['test_error'] - row['fit_error'])
    network, meta = evaluate.load_weights('n/weights.pt')
    assert meta['stem'] == 'imagenet' and network.stem1 is not None
    for more in (['random_labels', '--source', 'imagenet', '--train_portion', '0.5',
                  '--valid_fraction', '0.5'],
                 ['noise', '--preset', 'imagenet', '--num_classes', '3', '--num_images', '60']):
        run(search.main, more[0], *flags, '--max_steps', '1', '--data', *more)


def test_search_retrain_and_evaluate_on_chest_x_rays(capsys):
    chexpert('d', patients=40)
    flags = [*SIZES, '--batch_size', '4', '--data_dir', 'd', '--image_size', '16']
    halves = ['--train_portion', '0.5', '--valid_fraction', '0.5']
    run(search.main, 'r', *flags, '--data', 'chexpert', *halves)
    run(search.main, 'q', *flags, '--data', 'random_labels', '--source', 'chexpert',
        '--label_mode', 'permute', *halves)
    lines = run(retrain.main, 'n', *flags, '--data', 'chexpert', '--arch', 'r',
                '--holdout_patients', '0.2', '--uncertain', 'ignore', '--views', 'all')
    best = max(lines, key=lambda line: line['holdout_auroc_tasks'])
    row, = reports(capsys, 'n')
    assert row['test_auroc_tasks'] == pytest.approx(best['test_auroc_tasks'], abs=1e-9)
    assert row['test_n'] == 6                           # studies, of two views each
    assert 'Fracture' not in row['test_areas'] and len(row['test_areas']) == 13
    assert all(low <= area <= high for area, low, high, _ in row['test_areas'].values())
    # Labels of the test set: by study, its images in test/ beside them.
    os.rename('d/CheXpert-v1.0-small/valid', 'd/test')
    rows = {r['Path'].rsplit('/', 1)[0].replace('valid', 'test'): r
            for r in read_rows('d/CheXpert-v1.0-small/valid.csv')}
    write_rows('d/labels.csv', [{'Study': study.split('/', 1)[1],
                                 **{k: r[k] for k in generate_data.CHEXPERT}}
                                for study, r in rows.items()], ['Study', *COLUMNS[5:]])
    again, = reports(capsys, 'n', '--test_labels', 'd/labels.csv')
    assert again['test_areas'] == row['test_areas']
    assert evaluate.main(['n', '--test_labels', 'd/labels.csv', '--scores', 's.csv']) == 0
    scores = {(r['image'], r['label']): float(r['score']) for r in read_rows('s.csv')}
    assert len(scores) == 6 * 14 and all(0 < score < 1 for score in scores.values())
    for name, (area, *_) in row['test_areas'].items():
        mine = np.array([scores['/'.join(study.split('/')[-2:]), name] for study in rows])
        truth = np.array([float(r[name] or 0) for r in rows.values()])
        assert evaluate.auroc(mine, truth) == pytest.approx(area)
    one_line(capsys, retrain.main([*flags, '--data', 'chexpert', '--arch', 'r', '--save', 's',
                                   '--label_smoothing', '0.1']), 'several labels')


def test_no_patient_is_in_both_halves():
    chexpert('d', patients=20)
    data = generate_data.read('chexpert', {'data_dir': 'd', 'image_size': 16, 'views': 'all'})
    for seed in range(3):
        first, second = search.two_parts(data, search.parse(['--seed', str(seed)]))
        assert len(first) == len(second) == 20
        assert not set(data.patients[first]) & set(data.patients[second])
        args = retrain.parse(['--arch', 'DARTS_V2', '--holdout_patients', '0.3'])
        rows, held = retrain.split_rows(data, args)
        assert len(held) and not set(data.patients[rows]) & set(data.patients[held])


def test_published_counts_of_the_imagenet_network(capsys):
    """Of DARTS's cell at 48 channels and 14 layers: 4.7 M parameters, 530 M multiply-adds."""
    counts, = reports(capsys, '--arch', 'DARTS_V2', '--cost', '--image_size', '224',
                      '--init_channels', '48', '--layers', '14', '--num_classes', '1000')
    assert counts['params'] == 4718752 and counts['params_auxiliary'] == 5979528
    assert round(counts['multiply_adds'] / 1e6, 1) == 529.9


def test_presets_are_the_published_recipes():
    def expect(args, **values):
        assert values.items() <= vars(args).items()
        return args

    args = expect(search.parse(['--data', 'imagenet', '--method', 'pcdarts']), batch_size=1024,
                  learning_rate=0.5, arch_learning_rate=6e-3, arch_grad_clip=5, warmup_epochs=5,
                  frozen_epochs=35, partial=2, train_portion=0.1, valid_fraction=0.025,
                  image_size=224)
    assert round(retrain.learning_rate_at(args, 15, 50), 4) == 0.3969
    for method in ('sdarts', 'betadarts'):
        expect(search.parse(['--space', 'nb201', '--method', method]), epochs=100, nesterov=False,
               weight_decay=3e-4)
    expect(search.parse(['--method', 'gdas']), epochs=250, layers=6, batch_size=256,
           weight_decay=5e-4, nesterov=True)
    expect(search.parse(['--data', 'random_labels', '--source', 'chexpert']), image_size=224)
    expect(retrain.parse(['--arch', random_string(0)]), epochs=200, learning_rate=0.1, layers=17,
           grad_clip=0)
    expect(retrain.parse(['--arch', 'DARTS_V2', '--data', 'imagenet']), epochs=250, layers=14,
           batch_size=1024, learning_rate=0.5, schedule='linear', warmup_epochs=5,
           weight_decay=3e-5, label_smoothing=0.1, init_channels=48)
    expect(retrain.parse(['--arch', 'DARTS_V2', '--data', 'chexpert']), optimizer='adam',
           learning_rate=1e-4, image_size=320, holdout_patients=0.02)


def test_the_learning_rate_on_imagenet_is_that_of_pcdarts_and_follows_the_batch():
    for flags, rate in (([], 0.25), (['--learning_rate', '0.3'], 0.3)):
        args = search.parse(['--data', 'imagenet', '--batch_size', '512', *flags])
        assert args.learning_rate == rate
    args = retrain.parse(['--arch', 'DARTS_V2', '--data', 'imagenet', '--epochs', '10'])
    assert args.warmup_epochs == 0                      # of a short run the same share
    args = retrain.parse(['--arch', 'DARTS_V2', '--data', 'imagenet'])
    rates = [retrain.learning_rate_at(args, epoch, 250) for epoch in range(250)]
    falling = [0.5 * (245 - epoch) / 245 for epoch in range(245)]
    last = [0.5 * (250 - epoch) / (5 * 245) for epoch in range(245, 250)]
    warm_up = np.minimum(1, np.arange(1, 251) / 5)
    assert np.allclose(rates, np.multiply(falling + last, warm_up))


def test_unreal_data_of_a_target_are_split_in_larger_shares():
    make_set('set')
    for data, shares in (('noise', (0.8, 0.2)), ('generated', (0.8, 0.2)), ('set', (0.8, 0.2)),
                         ('imagenet', (0.1, 0.025))):
        args = search.parse(['--data', data, '--preset', 'imagenet'])
        assert (args.train_portion, args.valid_fraction) == shares
    noise = search.parse(['--preset', 'imagenet'])
    assert (noise.num_classes, noise.num_images, noise.image_size) == (1000, 128000, 224)


def test_unknown_labels_add_nothing_and_smoothing_is_the_mean_over_classes():
    logits, y = torch.randn(3, 4, requires_grad=True), torch.tensor([[0., 1, -1, 1]] * 3)
    evaluate.loss_of(logits, y).backward()
    assert (logits.grad[:, 2] == 0).all() and (logits.grad[:, [0, 1, 3]] != 0).all()
    logits, y = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 0])
    smooth = 0.9 * torch.eye(4)[y] + 0.1 / 4
    wanted = -(smooth * logits.log_softmax(1)).sum(1).mean()
    assert torch.allclose(evaluate.loss_of(logits, y, 0.1), wanted)
