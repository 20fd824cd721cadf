"""What must be true of every figure, and cannot be seen from one example."""

import io
import itertools
import json
import re
import subprocess
import sys

import matplotlib as mpl
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from llmft.core import LabError
from llmft.runs import figures, tables
from llmft.runs.numbers import show_column, show_metric, show_number

GiB = 2**30
log = [dict(step=step, loss=3 - step / 40) for step in range(1, 61)]
breakdown = dict(weights=6 * GiB, gradients=0.1 * GiB, optimiser=0.2 * GiB, activations=3 * GiB, logits=GiB)


def draw_all():
    "One figure of each kind."
    return dict(
        loss=figures.loss_curves({'full': log, 'lora': log}, {'full': [dict(step=30, loss=2.5)]}),
        bars=figures.bars(dict(full=28.45, lora=16.26, unknown=None), 'Peak memory', 'GB', baseline='full'),
        frontier=figures.frontier(dict(full=(38, 28.0), lora=(233, 16.0)), 'time, seconds', 'memory, GB'),
        memory=figures.memory_bars(dict(full=breakdown), dict(full=11 * GiB)),
        lengths=figures.length_histogram([3, 40, 700], 512),
    )


def boxes(texts):
    return [text.get_window_extent() for text in texts]


def overlapping(boxes):
    return [
        (a, b)
        for a, b in itertools.combinations(boxes, 2)
        if mpl.transforms.Bbox.intersection(a.padded(-0.5), b.padded(-0.5))
    ]


def test_every_axis_has_a_label_and_numbers_have_units():
    for name, plot in draw_all().items():
        (axes,) = plot.axes
        assert axes.get_xlabel() and axes.get_title(loc='left'), name
        assert axes.get_ylabel() or [label.get_text() for label in axes.get_yticklabels()], name
    assert (
        draw_all()['loss'].axes[0].get_ylabel() == 'loss, nats per token'
        and draw_all()['memory'].axes[0].get_xlabel() == 'memory, GiB'
    )


@pytest.mark.parametrize(
    'empty',
    [
        lambda: figures.loss_curves({}),
        lambda: figures.loss_curves({'a': []}, {'a': [dict(step=1, loss=float('nan'))]}),
        lambda: figures.bars({}, 'Time', 's'),
        lambda: figures.bars(dict(a=None, b=float('nan')), 'Time', 's'),
        lambda: figures.frontier({}, 'x', 'y'),
        lambda: figures.frontier(dict(a=(1, None)), 'x', 'y'),
        lambda: figures.memory_bars({}),
        lambda: figures.memory_bars(dict(a={})),
        lambda: figures.length_histogram([]),
        lambda: tables.table([]),
    ],
)
def test_nothing_to_draw_is_said(empty):
    with pytest.raises(LabError, match='nothing to draw'):
        empty()


def test_bars_say_value_and_ratio():
    plot = figures.bars(dict(full=10.0, lora=4.0, unknown=None), 'Time', 'seconds', baseline='full')
    words = [text.get_text() for text in plot.axes[0].texts]
    assert words[1:] == ['10.0', '4.00  ×0.4', '–'] or words[1:] == ['10.0', '4.00  ×0.400', '–'], words
    with pytest.raises(LabError, match="did you mean 'full'"):
        figures.bars(dict(full=1), 'Time', 's', baseline='ful')


def test_texts_of_bars_stay_inside():
    for plot in (
        figures.bars({'a name': 1e9, 'b': 3.0}, 'Parameters', 'parameters', baseline='b'),
        figures.memory_bars(dict(a=breakdown, b=breakdown), dict(a=20 * GiB)),
    ):
        (axes,) = plot.axes
        plot.draw_without_rendering()
        ends = [text.get_window_extent().x1 for text in axes.texts if text.xycoords == 'data']
        assert len(ends) >= 2 and max(ends) <= axes.get_window_extent().x1 + 1


def test_a_long_note_leaves_the_bars_their_room_and_is_whole():
    note = 'of the best matrix product, or copy, on this card; higher is better'
    names = {f'a piece of work with a long name {number}': number / 9 for number in range(1, 9)}
    plot = figures.bars(names, 'How near the work comes', 'share of the best rate', note=note)
    (axes,) = plot.axes
    plot.draw_without_rendering()
    words = axes.texts[0].get_window_extent()
    assert axes.texts[0].get_text() == note and 0 <= words.x0 and words.x1 <= plot.bbox.x1
    assert axes.get_window_extent().width > 0.3 * plot.bbox.width


def test_a_single_bar_has_no_ratio_and_an_exact_prediction_no_sign():
    assert len(figures.bars(dict(alone=3.0), 'Speed', 'tokens/s', 'alone').axes[0].texts) == 1
    texts = figures.memory_bars(dict(a=dict(weights=GiB)), dict(a=1.001 * GiB)).axes[0].texts
    assert any(text.get_text().endswith('(prediction 0%)') for text in texts)


def test_only_runs_that_were_measured_have_a_measured_line():
    def measured_lines(measured):
        (axes,) = figures.memory_bars(dict(a=breakdown, b=breakdown), measured).axes
        return [text.get_text() for text in axes.texts if text.get_text().startswith('measured')]

    assert measured_lines({}) == measured_lines(None) == []
    assert measured_lines(dict(b=None)) == ['measured –'] and len(measured_lines(dict(a=GiB, b=GiB))) == 2


def test_no_legend_or_name_covers_data():
    plot = figures.memory_bars(dict(a=breakdown))
    plot.draw_without_rendering()
    assert plot.axes[0].get_legend().get_window_extent().y0 >= plot.axes[0].get_window_extent().y1 - 1
    assert not overlapping([plot.axes[0].get_legend().get_window_extent(), *boxes([plot.axes[0]._left_title])])
    runs = {  # they differ until the last step
        f'run-{index}': [dict(row, loss=row['loss'] + index / (500 if row is log[-1] else 5)) for row in log]
        for index in range(12)
    }
    plot = figures.loss_curves(runs, window=1)
    plot.draw_without_rendering()
    names = [mpl.text.Text.get_window_extent(text) for text in plot.axes[0].texts if text.get_text().startswith('run-')]
    assert len(names) == 12 and not overlapping(names)
    assert all(box.x0 >= plot.axes[0].get_window_extent().x1 and box.x1 <= plot.bbox.x1 + 1 for box in names)


@settings(max_examples=8, deadline=None, phases=[Phase.generate])  # shrinking would draw hundreds of figures
@given(
    st.lists(
        st.tuples(st.floats(1, 500), st.floats(1, 30)),
        min_size=1,
        max_size=9,
        unique_by=lambda p: (round(p[0] / 40), round(p[1] / 3)),
    )
)
def test_labels_of_a_frontier_do_not_overlap(points):
    plot = figures.frontier(
        {f'method {index}': point for index, point in enumerate(points)}, 'time, seconds', 'memory, GB'
    )
    plot.draw_without_rendering()
    frame = plot.axes[0].get_window_extent()
    labels = [
        mpl.text.Text.get_window_extent(text) for text in plot.axes[0].texts if text.get_text().startswith('method')
    ]
    assert len(labels) == len(points) and not overlapping(labels)
    assert all(
        box.x0 >= frame.x0 - 1 and box.x1 <= frame.x1 + 1 and box.y0 >= frame.y0 - 1 and box.y1 <= frame.y1 + 1
        for box in labels
    )


def test_labels_of_a_frontier_stand_beside_its_steps():
    names = dict(a=(4.75, 36.4), b=(7.55, 35.9), c=(8.34, 34.1), d=(11.9, 34.12), e=(11.3, 34.09), f=(16.7, 34.1))
    plot = figures.frontier(names, 'memory, MiB', 'perplexity')
    plot.draw_without_rendering()
    (steps,) = [line for line in plot.axes[0].lines if len(line.get_xdata()) > 1]
    corners = plot.axes[0].transData.transform(steps.get_xydata())
    assert len(corners) == 7  # four points of the frontier, joined by three corners
    texts = [text for text in plot.axes[0].texts if text.get_text() in names]
    for text in texts:
        box = mpl.text.Text.get_window_extent(text)
        assert not mpl.path.Path(corners).intersects_bbox(box, filled=False), f'{text.get_text()} is on the line'
    assert len(texts) == 6


def test_crowded_labels_of_a_frontier_do_not_overlap():
    "Thirteen methods of a real study, some of them almost on one spot: no label covers a label or a point."
    times = [37.77, 233.16, 316.09, 270.72, 313.94, 343.09, 411.29, 375.45, 379.33, 351.12, 503.26, 358.34, 495.78]
    memory = [28.45, 16.26, 9.34, 16.26, 16.29, 9.35, 9.37, 7.24, 7.24, 5.45, 5.48, 5.45, 5.48]
    points = list(zip(times, memory, strict=True))
    plot = figures.frontier(
        {f'method {index:02}': point for index, point in enumerate(points)}, 'time, seconds', 'memory, GB'
    )
    plot.draw_without_rendering()
    labels = [
        mpl.text.Text.get_window_extent(text) for text in plot.axes[0].texts if text.get_text().startswith('method')
    ]
    spots = [mpl.transforms.Bbox.from_bounds(x - 2, y - 2, 4, 4) for x, y in plot.axes[0].transData.transform(points)]
    assert len(labels) == 13 and not overlapping(labels)
    assert not [(label, spot) for label in labels for spot in spots if label.overlaps(spot)]


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=12))
def test_the_frontier_is_what_nothing_beats(pairs):
    points = dict(enumerate(pairs))
    best = figures.pareto(points)
    beaten = {name for name, (x, y) in points.items() if any(a <= x and b <= y and (a, b) != (x, y) for a, b in pairs)}
    assert best and set(best) == set(points) - beaten


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=12), st.floats(0.1, 2))
def test_spread_keeps_order_and_distance(wanted, gap):
    placed = figures.spread(wanted, gap)
    assert all(np.diff(np.sort(placed)) >= gap - 1e-9)
    assert [placed[i] for i in np.argsort(wanted, kind='stable')] == sorted(placed)
    if len(wanted) == 1:
        assert placed[0] == pytest.approx(wanted[0])


@pytest.mark.parametrize(
    'user',
    [
        {'savefig.transparent': True},
        {'savefig.facecolor': 'black', 'figure.facecolor': 'black', 'axes.facecolor': 'black', 'text.color': 'white'},
    ],
    ids=['transparent', 'dark'],
)
def test_every_figure_brings_its_own_white_ground(user):
    with mpl.rc_context(user):
        for name, plot in draw_all().items():
            plot.savefig(data := io.BytesIO(), format='png', dpi=50)
            image = np.asarray(Image.open(data).convert('RGBA'))
            assert (
                tuple(image[2, 2]) == (255, 255, 255, 255) and image[..., 3].min() == 255 and image[..., :3].std() > 10
            ), name


def seen(colour, matrix):
    "CIELAB of a colour as seen with one kind of cones missing (Machado, Oliveira and Fernandes 2009)."
    linear = np.array([c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in mpl.colors.to_rgb(colour)])
    xyz = (
        np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
        @ np.clip(np.array(matrix) @ linear, 0, 1)
        / [0.9505, 1, 1.089]
    )
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize(
    'matrix',
    [
        np.eye(3),
        [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
        [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
        [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
    ],
    ids=['all cones', 'no long', 'no medium', 'no short'],
)
def test_colours_stay_apart(matrix):
    apart = [np.linalg.norm(seen(a, matrix) - seen(b, matrix)) for a, b in itertools.combinations(figures.palette, 2)]
    assert len(apart) == 21 and min(apart) > 15


def test_nothing_is_left_open():
    program = (
        'import gc, json, sys, weakref; from llmft.runs import figures; '
        "picture = figures.bars(dict(a=1, b=2), 'Time', 's'); pixels = picture._repr_png_(); "
        'kept = weakref.ref(picture); del picture; gc.collect(); '
        "print(json.dumps(dict(drawn=bool(pixels), kept=kept() is not None, pyplot='matplotlib.pyplot' in sys.modules)))"
    )
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == dict(drawn=True, kept=False, pyplot=False)


numbers = st.floats(allow_nan=True, allow_infinity=True) | st.integers(-(10**20), 10**20) | st.none()


@given(st.lists(numbers, min_size=1, max_size=6), st.integers(2, 6))
def test_no_number_has_a_prefix_without_a_unit(values, digits):
    texts = [*map(lambda value: show_number(value, digits), values), *show_column(values, digits)]
    assert not [text for text in texts if re.search(r'[a-zA-Zµ]', text)]


@pytest.mark.parametrize('name, unit', [('flops', 'TFLOP'), ('flops_per_sec', 'TFLOP/s'), ('copy_bytes_per_sec', 'TB/s')])
def test_counts_have_the_unit_that_their_name_means(name, unit):
    assert show_metric(name, 1.917e12) == f'1.92 {unit}'
    if name == 'flops':
        shown = tables.table([dict(flops=1.917e12), dict(flops=9e9)], [tables.column('flops', 'training', 'FLOP')])
        assert '<small>TFLOP</small>' in shown and '1.92' in shown and ' T<' not in shown
        assert 'TFLOP' in figures.bars(dict(a=1.917e12), 'Training', 'FLOP').figure.axes[0].get_xlabel()


@given(st.lists(st.floats(1e-4, 1e4), min_size=2, max_size=6))
def test_fractions_of_a_column_follow_one_rule(values):
    texts = show_column(values)
    assert len({len(text.partition('.')[2]) for text in texts if '.' in text}) <= 1, 'the points are not in line'
    digits = [len(text.strip().replace('.', '').replace(',', '').lstrip('0')) for text in texts]
    if min(digits) < 3:
        assert all(float(f'{value:.1e}') == value for value in values), 'some fractions lost their zeros, others not'


@pytest.mark.parametrize(
    'values, texts',
    [
        ([0.02, 0.003], ['0.02', '0.003']),
        ([0.0213, 0.003], ['0.0213', '0.00300']),
        ([0.02, 0.5], ['0.0200', '0.500']),
        ([1.5, 1.25, None], ['1.50', '1.25', '–']),
    ],
)
def test_zeros_at_the_end_are_the_same_within_a_column(values, texts):
    assert [text.strip() for text in show_column(values)] == texts
    shown = tables.table([dict(x=value) for value in values])
    cells = re.findall(r'<td[^>]*>(.*?)</td>', shown)
    assert [re.sub('<span class="pad">.*?</span>', '', cell) for cell in cells] == texts


def test_tables_escape_mark_the_best_and_do_not_invent():
    rows = [
        dict(method='<b>full</b>', loss=1.5, n=10),
        dict(method='lora', loss=1.25, n=10),
        dict(method='qlora', loss=None, n=None),
    ]
    shown = tables.table(rows, ['method', tables.column('loss', unit='nats', best='low', n='n')])
    assert '<b>full' not in shown and '&lt;b&gt;full' in shown and '<b>1.25</b>' in shown and '<b>1.50</b>' not in shown
    assert (
        '<td class="unknown" data-label="loss, nats">–</td>' in shown
        and '<small>nats</small>' in shown
        and 'overflow-x:auto' in shown
        and 'n = 10' in shown
    )
    assert not any(word in shown for word in ('http', '<script', 'src='))


@given(st.lists(st.integers(0, 2000), min_size=1, max_size=50), st.integers(1, 1000))
@settings(max_examples=15, deadline=None, phases=[Phase.generate])
def test_histogram_counts_every_row_once(lengths, limit):
    (axes,) = figures.length_histogram(lengths, limit).axes
    assert sum(bar.get_height() for bar in axes.patches) == len(lengths)
    beyond = sum(
        bar.get_height() for bar in axes.patches if mpl.colors.to_hex(bar.get_facecolor()) == figures.palette[1].lower()
    )
    assert beyond == sum(length > limit for length in lengths)


def test_many_equal_curves_share_one_name():
    "Fifteen runs whose losses lie on each other, as those of one method under several strategies do."
    falling = [dict(step=step, loss=4 - step / 10) for step in range(1, 11)]
    low = [row | dict(loss=row['loss'] - 1) for row in falling]
    runs = {f'lora_{number}': falling for number in range(8)} | dict(lora=falling, full=low)
    names = {text.get_text() for text in figures.loss_curves(runs).axes[0].texts}
    assert {'lora and 8 like it', 'full'} <= names and 'lora_3' not in names
    few = {text.get_text() for text in figures.loss_curves({name: runs[name] for name in list(runs)[:3]}).axes[0].texts}
    assert {'lora_0', 'lora_1', 'lora_2'} <= few
