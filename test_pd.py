"""The tests of pd.py, and the classroom kit that is made of them.

    python -m pytest test_pd.py                     # every test
    python test_pd.py handout mine.py               # pd.py, with exercises to fill in
    python test_pd.py grade mine.py ...             # points, and what is first wrong
    python test_pd.py hint NAME                     # help with an exercise
    python test_pd.py hunt 1 strange.py             # pd.py, with a mistake to find
    python test_pd.py benchmark                     # how fast this machine trains and samples
    python test_pd.py seeds                         # raw-pixel distances of several runs

The name of a test is the property, its failure says where it does not hold. The sections have
the numbers of pd.py. To grade with all that pytest offers:
PD_FILE=mine.py python -m pytest test_pd.py -m exercise
"""
import argparse
import ast
import contextlib
import copy
import importlib.util
import io
import json
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import warnings
from itertools import pairwise
from pathlib import Path
from unittest.mock import Mock
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image
from pytest import approx
from torch import nn

import pd as official

# ---- Reference: the paper in float64, by its log-SNR -----------------------------------------
FIRST = math.atan(math.exp(-10))  # the angle at t = 0; at t = 1 it is π/2 - FIRST
TIMES = torch.tensor([0.25, 0.5, 0.75, 0.1, 0.9, 0, 1 / 8192, 1], dtype=torch.float64)


def exact(t, z):
    """α_t, σ_t and λ_t, shaped to multiply z: α² = sigmoid(λ), σ² = sigmoid(-λ)."""
    t = torch.as_tensor(t, dtype=torch.float64)
    angle = FIRST + (math.pi / 2 - 2 * FIRST) * t
    angle = angle.reshape(-1, *[1] * (z.ndim - 1))
    log_snr = -2 * torch.log(torch.tan(angle))
    alpha = torch.sigmoid(log_snr).sqrt()
    sigma = torch.sigmoid(-log_snr).sqrt()
    return alpha, sigma, log_snr


def noisy(x, eps, t):
    alpha, sigma, _ = exact(t, x)
    return alpha * x + sigma * eps


def outputs(x, z, t):
    """The output of a network that predicts x, by parameterization."""
    alpha, sigma, _ = exact(t, z)
    eps = (z - alpha * x) / sigma
    v = alpha * eps - sigma * x
    return {"v": v, "eps": eps, "x": x}


def ddim(x, z, t, s):
    """Equation 8: z_s from z_t."""
    alpha_t, _, log_snr_t = exact(t, z)
    alpha_s, _, log_snr_s = exact(s, z)
    r = torch.exp((log_snr_t - log_snr_s) / 2)
    return r * alpha_s / alpha_t * z + alpha_s * (1 - r) * x


def walk(model, z, times):
    """z after a DDIM step from each time to the next."""
    for t, s in pairwise(times):
        x, _ = model(z, t)
        z = ddim(x, z, t, s)
    return z


def posterior(x, z, t, s, variance_interpolation=1.0):
    """Mean and standard deviation of z_s, Equations 3 to 5."""
    alpha_t, sigma_t, log_snr_t = exact(t, z)
    alpha_s, sigma_s, log_snr_s = exact(s, z)
    r = torch.exp(log_snr_t - log_snr_s)
    mean = r * alpha_s / alpha_t * z + (1 - r) * alpha_s * x
    sigma = torch.lerp(sigma_s.log(), sigma_t.log(), variance_interpolation).exp()
    std = (1 - r).sqrt() * sigma
    return mean, std


def denoiser(predict):
    """A model (z, t) -> (x̂, ε̂) from a rule x̂ = predict(z, α, σ)."""

    def model(z, t):
        alpha, sigma, _ = exact(t, z)
        x = predict(z, alpha, sigma)
        eps = (z - alpha * x) / sigma
        return x.to(z), eps.to(z)

    return model


def always(value):
    return denoiser(lambda z, alpha, sigma: torch.full_like(z, value))


@denoiser
def two_points(z, alpha, sigma):  # exact for data that are 1 or -1
    return torch.tanh(alpha * z / sigma**2)


# ---- Tools: the file under test, exercises, comparisons --------------------------------------
warnings.simplefilter("ignore", pytest.PytestUnknownMarkWarning)  # there is no pytest.ini
exercise = pytest.mark.exercise
parametrize = pytest.mark.parametrize
# A new exercise is a line in HINTS, tests marked with its name (a docstring continues the name
# of a test; the first that fails is shown first), wrong answers in the list above
# test_wrong_answer_is_graded_with_words_that_lead_to_it, a function with a docstring in pd.py.
HINTS = {
    "alpha_sigma": "Which angle of the quarter circle has log-SNR 20, which -20?",
    "log_snr": "The log of a square is twice the log; the signal is above, the noise below.",
    "to_x_eps": "(z, v) is (x, ε), turned by an angle: turn it back. From x or ε, solve "
    "z = α x + σ ε. Both: a mean of what they say of x; α² and σ² add up to 1.",
    "loss_weight": "ε - ε̂ = -α/σ (x - x̂): square it.",
    "weighted_loss": "One number for each example: what shape has the weight?",
    "ddim_step": "z_s is made of signal and noise just as z_t is, at another time.",
    "ancestral_step": "e^(λ_t - λ_s) is the square of α_t σ_s / (σ_t α_s).",
    "sample": "Do N = 2 on paper: at which t is the model asked, to which s does it go?",
    "distill_target": "z_s = α_s x̃ + σ_s (z_t - α_t x̃) / σ_t is linear in x̃. And if s ≈ t?",
    "sample_times": "One random shift of 0, 1/num, 2/num, ...; a student's sampler visits few t.",
    "training_loss": "What is the target of a teacher? Where does a student's step from t end?",
    "distill": "Do 8 -> 1 on paper: who teaches the student of 2 steps?",
    "outcome": "This uses all exercises: fix the others first.",
}
NAMES = [name for name in HINTS if name != "outcome"]
PARAMS = "v", "eps", "x", "both"
WEIGHTINGS = "truncated", "snr+1", "snr", "constant"
SAMPLERS = "ddim", "ancestral"
every_shape = parametrize("dims", [(2, 4, 4), (2,), ()], ids=["images", "points", "numbers"])


def load(file):
    """The module of a file like pd.py, outside of `import`."""
    spec = importlib.util.spec_from_file_location("pd", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def module():
    try:
        return load(os.environ.get("PD_FILE", official.__file__))
    except SystemExit:  # it would confuse pytest
        pytest.fail("the file calls sys.exit")


@pytest.fixture
def pd(request, module, monkeypatch):
    """The file under test. In the tests of an exercise, all other exercises are solved."""
    torch.manual_seed(0)
    mark = request.node.get_closest_marker("exercise")
    if mark and mark.args != ("outcome",):
        for name in NAMES:
            if name not in mark.args:
                monkeypatch.setattr(module, name, getattr(official, name), raising=False)
    return module


def check(got, expected, what, times=None, rtol=1e-5, atol=1e-9):
    """Assert equality up to rounding. The message has the first difference."""
    __tracebackhide__ = True
    assert torch.is_tensor(got), f"{what} is {got}, not a tensor: is a `return` missing?"
    expected = torch.as_tensor(expected)
    if expected.ndim == 0:
        expected = expected.expand(got.shape)
    shapes = f"{what} has shape {list(got.shape)}, not {list(expected.shape)}"
    assert got.shape == expected.shape, shapes
    error = (got - expected).abs() / (atol + rtol * expected.abs())
    wrong = ~(error <= 1).flatten()  # NaN is wrong, too
    first = wrong.int().argmax()
    message = f"{what} is {got.flatten()[first]:.6g}, not {expected.flatten()[first]:.6g}"
    if times is not None:
        each = len(wrong) // len(times)
        message += f", at time {times[first // each]:.4g}"
    assert not wrong.any(), message


def check_times(model, times):
    """Was the model, a Mock, asked at these times?"""
    __tracebackhide__ = True
    asked = [round(float(call.args[1]), 4) for call in model.call_args_list]
    times = [round(t, 4) for t in times]
    assert asked == approx(times, abs=1e-3), f"it is asked at t = {asked}, not {times}"


def example(*dims):
    """(x, ε, z_t), one for each of TIMES."""
    x, eps = torch.randn(2, len(TIMES), *dims).double()
    return x, eps, noisy(x, eps, TIMES)


# ---- 1. Schedule -----------------------------------------------------------------------------
@exercise("alpha_sigma")
def test_alpha_sigma_are_on_the_unit_circle(pd):
    """α² + σ² = 1"""
    alpha, sigma = pd.alpha_sigma(TIMES)
    check(alpha**2 + sigma**2, 1.0, "α² + σ²", TIMES)


@exercise("alpha_sigma")
def test_alpha_sigma_turn_at_constant_speed(pd):
    """from the angle of log-SNR 20 at t = 0 to that of log-SNR -20 at t = 1"""
    alpha, sigma = pd.alpha_sigma(TIMES)
    degrees = torch.rad2deg(torch.atan2(sigma, alpha))
    first = math.degrees(FIRST)
    right = first + (90 - 2 * first) * TIMES
    check(degrees, right, "the angle in degrees", TIMES)


@exercise("alpha_sigma")
@parametrize("which, name", [(0, "α_t"), (1, "σ_t")])
def test_alpha_sigma_keep_their_digits_in_float32(pd, which, name):
    """where they are almost 0, too; a cosine near π/2 does not"""
    times = TIMES.float()
    got = pd.alpha_sigma(times)[which]
    check(got, exact(times, times)[which], f"{name} in float32", times)


@exercise("log_snr")
def test_log_snr_falls_from_20_to_minus_20(pd):
    """it is the log of α²/σ², 0 where they are equal"""
    check(pd.log_snr(TIMES), exact(TIMES, TIMES)[2], "λ_t", TIMES)


# ---- 2. Parameterizations --------------------------------------------------------------------
@exercise("to_x_eps")
@parametrize("param", PARAMS)
def test_to_x_eps_of_a_perfect_network_is_x_and_eps(pd, param):
    """those of z_t = α_t x + σ_t ε, x first"""
    x, eps, z = example(3, 4, 4)
    perfect = outputs(x, z, TIMES) | {"both": torch.cat([x, eps], 1)}
    x_hat, eps_hat = pd.to_x_eps(perfect[param], z, TIMES, param)
    check(x_hat, x, "x̂", TIMES)
    check(eps_hat, eps, "ε̂", TIMES)


@exercise("to_x_eps")
def test_to_x_eps_of_both_trusts_x_at_high_noise_and_eps_at_low(pd):
    """x̂ is a mean of x̃, with weight σ², and of what ε̃ says of x; α_t x̂ + σ_t ε̂ = z_t"""
    x_out, eps_out, _ = example(2)
    z = torch.randn_like(x_out)
    alpha, sigma, _ = exact(TIMES, z)
    x_hat, eps_hat = pd.to_x_eps(torch.cat([x_out, eps_out], 1), z, TIMES, "both")
    check(x_hat, sigma**2 * x_out + alpha * (z - sigma * eps_out), "x̂", TIMES)
    check(eps_hat, outputs(x_hat, z, TIMES)["eps"], "ε̂", TIMES)


@parametrize("t", [0.25, torch.tensor(0.25)])
def test_network_gets_a_time_for_each_example_in_one_kind_of_tensor(pd, t):
    """so that torch.compile sees one kind of input"""
    net = Mock(side_effect=lambda z, t: z, spec=[])
    pd.Denoiser(net)(torch.randn(2, 3), t)
    times = net.call_args.args[1]
    check(times, torch.full((2,), 0.25), "t")
    assert times.dtype == torch.float32
    assert times.is_contiguous()


# ---- 3. Loss weights -------------------------------------------------------------------------
@exercise("loss_weight")
@parametrize(
    "weighting, param", [("snr", "eps"), ("snr+1", "v"), ("constant", "x")]
)
def test_loss_weight_turns_the_x_loss_into_the_eps_or_v_loss(pd, weighting, param):
    """w ‖x - x̂‖² is ‖ε - ε̂‖² with "snr", ‖v - v̂‖² with "snr+1" """
    x, x_hat, z = example()
    error = outputs(x, z, TIMES)[param] - outputs(x_hat, z, TIMES)[param]
    loss = pd.loss_weight(TIMES, weighting) * (x - x_hat) ** 2
    check(loss, error**2, f"the {weighting!r} loss", TIMES)


@exercise("loss_weight")
def test_loss_weight_truncated_is_the_snr_but_at_least_1(pd):
    """so that t = 1 counts, where a student of one step works"""
    snr = exact(TIMES, TIMES)[2].exp()
    check(pd.loss_weight(TIMES, "truncated"), snr.clamp(min=1), "w", TIMES)


@exercise("weighted_loss")
@every_shape
def test_weighted_loss_is_weight_times_mean_squared_x_error(pd, dims):
    """the mean over an example's own pixels; one number for each example"""
    x, x_hat, z = example(*dims)
    loss = pd.weighted_loss(lambda z, t: (x_hat, None), x, z, TIMES, "snr")
    mean = ((x - x_hat) ** 2).reshape(len(x), -1).mean(1)
    check(loss, pd.loss_weight(TIMES, "snr") * mean, "the loss", TIMES)


@parametrize("weighting", WEIGHTINGS)
@parametrize("param", PARAMS)
def test_loss_is_finite_in_float32_at_the_ends_of_time(pd, param, weighting):
    t = TIMES.float()
    x, z = torch.randn(2, len(t), 2)
    out = torch.randn(len(t), 4 if param == "both" else 2)
    model = pd.Denoiser(lambda z, t: out, param)
    loss = pd.weighted_loss(model, x, z, t, weighting)
    assert loss.isfinite().all()


# ---- 4. Sampling -----------------------------------------------------------------------------
@exercise("ddim_step")
@every_shape
def test_ddim_step_leads_to_the_z_made_of_the_same_x_and_eps(pd, dims):
    """with less noise"""
    x, eps, z = example(*dims)
    check(pd.ddim_step(x, eps, TIMES), z, "z_s", TIMES)


every_variance = parametrize(
    "options", [{}, {"variance_interpolation": 0.0}, {"variance_interpolation": 0.5}]
)


@exercise("ancestral_step")
@every_variance
def test_ancestral_step_draws_from_the_posterior(pd, options):
    """with σ_t in its deviation if variance_interpolation is 1, σ_s if 0, between in logs"""
    t = torch.tensor([0.75, 0.5, 1.0])
    s = torch.tensor([0.5, 0.1, 0.0])
    z = torch.full((3, 100_000), 0.8)
    x_hat = torch.full((3, 100_000), -0.5)
    draws = pd.ancestral_step(x_hat, z, t, s, **options).double()
    mean, std = posterior(-0.5, z[:, 0], t, s, **options)
    check(draws.mean(1), mean, "the mean of z_s", t, atol=0.02)
    check(draws.std(1), std, "the deviation of z_s", t, rtol=0.02)


@exercise("sample")
@parametrize("steps", [1, 2, 5])
def test_sample_asks_at_the_start_of_each_step(pd, steps):
    """t = 1, 1 - 1/N, ..., 1/N"""
    model = Mock(side_effect=two_points)
    pd.sample(model, torch.randn(4, 2), steps)
    check_times(model, [1 - i / steps for i in range(steps)])


@exercise("sample")
def test_sample_takes_steps_of_ddim(pd):
    """from t = 1 down to 0"""
    z = torch.randn(4, 2).double()
    x = walk(two_points, z, [1, 0.75, 0.5, 0.25, 0])
    check(pd.sample(two_points, z, 4), x, "x after 4 steps")


@exercise("sample")
@every_variance
def test_sample_ancestral_draws_each_step(pd, options):
    """from the posterior, with the upper variance if not told otherwise"""
    model = Mock(side_effect=always(-0.5))
    pd.sample(model, torch.full((100_000,), 0.8), 3, "ancestral", **options)
    (z, t), (z_next, s), _ = [call.args for call in model.call_args_list]
    mean, std = posterior(-0.5, z, t, s, **options)
    noise = (z_next - mean) / std
    check(noise.mean(), 0.0, "the mean of the noise", atol=0.02)
    check(noise.std(), 1.0, "the deviation of the noise", rtol=0.02)


@exercise("sample")
def test_sample_ancestral_draws_no_last_step(pd):
    """at t = 0 there is no noise to add: it is a step of DDIM"""
    z = torch.randn(1000)
    x = pd.sample(always(-0.5), z, 3, "ancestral")
    check(x, -0.5, "x, for a model that always says -0.5,", atol=1e-3)


@exercise("sample")
def test_sample_with_clip_limits_x_hat_and_makes_eps_hat_fit_it(pd):
    """α_t x̂ + σ_t ε̂ = z_t holds with the limited x̂"""
    z = torch.linspace(-2, 2, 41).double()
    loud = denoiser(lambda z, alpha, sigma: 3 * z)
    limited = denoiser(lambda z, alpha, sigma: (3 * z).clamp(-1, 1))
    x = pd.sample(loud, z, 4, clip=True)
    check(x, walk(limited, z, [1, 0.75, 0.5, 0.25, 0]), "x after 4 steps")


# ---- 5. Distillation -------------------------------------------------------------------------
@exercise("distill_target")
def test_distill_target_asks_the_teacher_at_the_start_of_each_of_its_steps(pd):
    """from t down to s"""
    teacher = Mock(side_effect=two_points)
    pd.distill_target(teacher, torch.randn(4, 2), 0.9, 0.3)
    check_times(teacher, [0.9, 0.6])


@exercise("distill_target")
@parametrize("value", [0.5, -3.0])
def test_distill_target_is_what_the_teacher_always_says(pd, value):
    """within [-1, 1] or not"""
    t = TIMES[TIMES > 0]
    z = torch.randn(len(t), 2).double()
    x_tilde = pd.distill_target(always(value), z, t, t / 2)
    check(x_tilde, value, "x̃", t)


@exercise("distill_target")
@parametrize("substeps", [1, 2, 3, 8])
def test_distill_target_lands_in_one_step_where_the_teacher_lands(pd, substeps):
    """a DDIM step with x̃ from z_t ends at the z_s where the teacher's steps end"""
    t = torch.tensor([1.0, 1.0, 0.75, 0.25]).double()
    s = torch.tensor([0.5, 0.0, 0.5, 0.0]).double()
    z = torch.randn(4, 3).double()
    times = [t + (s - t) * i / substeps for i in range(substeps + 1)]
    landing = walk(two_points, z, times)
    x_tilde = pd.distill_target(two_points, z, t, s, substeps)
    check(ddim(x_tilde, z, t, s), landing, "z_s", t)


@exercise("distill_target")
def test_distill_target_keeps_its_digits_in_float32(pd):
    """x̃ of a very short step is the teacher's x̂: do not subtract almost equal numbers"""
    t = torch.tensor([0.5, 0.75, 1.0])
    z = torch.randn(3, 50)
    x_hat, _ = two_points(z, t)
    x_tilde = pd.distill_target(two_points, z, t, t - 2**-17)
    check(x_tilde, x_hat, "x̃", t, atol=1e-3)


@exercise("sample_times")
@parametrize("steps", [1, 3, 4])
def test_sample_times_of_a_student_are_those_its_sampler_visits(pd, steps):
    """1/N, 2/N, ..., 1, each as often as the others"""
    t = pd.sample_times(12, "cpu", steps).sort().values
    right = torch.arange(1, steps + 1).repeat_interleave(12 // steps) / steps
    check(t, right, f"one of 12 sorted times for N = {steps}", rtol=1e-6)


@exercise("sample_times")
def test_sample_times_are_uniform_and_one_in_each_part_of_0_to_1(pd):
    """which is divided into `num` equal parts"""
    t = torch.cat([pd.sample_times(4, "cpu").sort().values for _ in range(500)])
    parts = torch.arange(1, 5).repeat(500)
    check(torch.ceil(4 * t).long(), parts, "the part of one of 4 sorted times")
    check(t.sort().values, torch.linspace(0, 1, 2000), "one of 2000 sorted times", atol=0.02)


@exercise("training_loss")
@every_shape
def test_training_loss_asks_the_model_about_z_made_of_x_and_eps(pd, dims):
    """z_t = α_t x + σ_t ε"""
    x, eps, z = example(*dims)
    model = Mock(side_effect=two_points)
    pd.training_loss(model, x, eps, TIMES, "snr")
    check(model.call_args.args[0], z, "z_t", TIMES)
    check(model.call_args.args[1], TIMES, "t")


@exercise("training_loss")
def test_training_loss_of_a_teacher_is_the_weighted_error_of_x(pd):
    """the mean over the batch"""
    x, eps, z = example(3)
    loss = pd.training_loss(two_points, x, eps, TIMES, "truncated")
    check(loss, official.weighted_loss(two_points, x, z, TIMES, "truncated").mean(), "the loss")


@exercise("training_loss")
def test_training_loss_of_a_student_ignores_the_data(pd):
    """its target is what the teacher says, whatever x is"""
    x = torch.full((4, 2), 0.5)
    t = torch.tensor([0.25, 0.5, 0.75, 1.0])
    says_0, says_2 = always(0.0), always(2.0)
    loss = pd.training_loss(says_0, x, torch.randn(4, 2), t, "constant", says_2, steps=4)
    check(loss, 4.0, "for data 0.5, student output 0 and teacher output 2, the loss")


@exercise("training_loss")
@parametrize("options, right", [({}, [0.75, 0.625]), ({"substeps": 3}, [0.75, 0.667, 0.583])])
def test_training_loss_has_a_student_learn_its_own_step(pd, options, right):
    """the teacher goes from z_t at t to t - 1/N in `substeps` steps, N = steps"""
    x, eps = torch.randn(2, 1, 3)
    t = torch.tensor([0.75])
    teacher = Mock(side_effect=two_points)
    pd.training_loss(two_points, x, eps, t, "snr", teacher, 4, **options)
    check_times(teacher, right)
    check(teacher.call_args_list[0].args[0], noisy(x, eps, t), "the teacher's first z")


def climb(pd, *steps):
    """(what `distill` yields, the calls of train_student), for a teacher that is the number 0."""
    add_one = Mock(side_effect=lambda student, teacher, steps: student.data.add_(1))
    teacher = nn.Parameter(torch.zeros(()))
    stages = list(pd.distill(teacher, *steps[:2], add_one, *steps[2:]))
    return [(None, teacher), *stages], [call.args for call in add_one.call_args_list]


@exercise("distill")
@parametrize("steps, right", [((8, 1), [4, 2, 1]), ((10, 3), [5]), ((27, 1, 3), [9, 3, 1])])
def test_distill_divides_the_steps_by_the_substeps(pd, steps, right):
    """until a student has final_steps"""
    (_, *stages), calls = climb(pd, *steps)
    yielded = [steps for steps, _ in stages]
    trained = [steps for _, _, steps in calls]
    assert yielded == right, f"from {steps} it yields {yielded}, not {right}"
    assert trained == right, f"from {steps} it trains {trained}, not {right}"


@exercise("distill")
def test_distill_trains_a_copy_of_each_teacher(pd):
    """and yields them"""
    stages, _ = climb(pd, 8, 1)
    values = [int(model) for _, model in stages]
    assert values == [0, 1, 2, 3], f"if training adds 1, models are {values}, not [0, 1, 2, 3]"


@exercise("distill")
def test_distill_makes_the_student_the_next_teacher(pd):
    """the model itself, not a copy"""
    stages, calls = climb(pd, 8, 1)
    assert len(calls) == 3, f"it trains {len(calls)} students from 8 steps to 1, not 3"
    for (_, model), (_, teacher, steps) in zip(stages, calls):
        assert teacher is model, f"the {steps}-step student has the wrong teacher"


class PointNet(nn.Sequential):
    """net(z, t), for points of the plane."""

    def __init__(self):
        super().__init__(
            nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2)
        )

    def forward(self, z, t):
        return super().forward(torch.cat([z, t[:, None]], 1))


def ring(num):
    angle = torch.rand(num) * 2 * math.pi
    return torch.stack([angle.cos(), angle.sin()], 1)


@exercise("outcome")
@pytest.mark.timeout(40)
def test_outcome_student_does_in_one_step_what_its_teacher_does_in_eight(pd):
    """on a ring, four times closer than one step of the teacher"""
    data = ring(2000)
    teacher = pd.Denoiser(PointNet())
    pd.train(teacher, data, 300, batch_size=256, lr=1e-2, ema=0.98)

    def train_student(student, teacher, steps):
        pd.train(student, data, 100, 3e-3, teacher, steps, batch_size=256)

    *_, (_, student) = pd.distill(teacher, 8, 1, train_student)
    z = torch.randn(1000, 2)
    goal = pd.sample(teacher, z, 8)
    off, allowed = [(pd.sample(model, z, 1) - goal).norm() for model in (student, teacher)]
    assert off < allowed / 4, f"its error is {off / allowed:.2g} times the teacher's"


# ---- 1 to 5 together -------------------------------------------------------------------------
def everything(pd, z, t, s, param="v"):
    """What the functions of parts 1 to 5 say of one z: targets and samples last."""

    def net(z, t):
        return torch.cat([z, z], 1) if param == "both" else z / 2

    model = pd.Denoiser(net, param)
    x_hat, eps_hat = model(z, t)
    return [
        x_hat,
        eps_hat,
        pd.ddim_step(x_hat, eps_hat, s),
        pd.ancestral_step(x_hat, z, t, s),
        *[pd.weighted_loss(model, z, z, t, weighting) for weighting in WEIGHTINGS],
        pd.training_loss(model, z, z, t, "snr", model, 4),
        *[pd.sample(model, z, 3, sampler, clip=True) for sampler in SAMPLERS],
        pd.distill_target(model, z, t, s),
    ]


def test_only_targets_and_samples_have_no_gradient(pd):
    results = everything(pd, torch.randn(4, 2).requires_grad_(), 0.5, 0.25)
    assert [result.requires_grad for result in results] == 9 * [True] + 3 * [False]


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@parametrize("dtype", [torch.float32, torch.float64])
@parametrize("param", PARAMS)
def test_results_have_the_type_and_device_of_z(pd, param, dtype):
    """On a fake GPU, where mixing devices is an error."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        z = torch.empty(4, 2, dtype=dtype, device="cuda")
        t = torch.empty(4, dtype=dtype, device="cuda")
        results = everything(pd, z, t, t, param)
        results += everything(pd, z, 0.5, 0.25, param)
        assert pd.sample_times(4, z.device).device == z.device
    assert {(x.dtype, x.device) for x in results} == {(dtype, z.device)}


Z = torch.ones(4, 2)


@parametrize("name, arguments, right", [
    ("to_x_eps", (Z, Z, 0.5, "?"), PARAMS),
    ("loss_weight", (0.5, "?"), WEIGHTINGS),
    ("sample", (two_points, Z, 2, "?"), SAMPLERS),
    ("sample", (two_points, Z, 0), ["1", "0"]),
    ("distill_target", (two_points, Z, 1.0, 0.5, 0), ["1", "0"]),
])  # fmt: skip
def test_invalid_arguments_are_refused_with_the_valid_ones(pd, name, arguments, right):
    with pytest.raises(ValueError) as error:
        getattr(pd, name)(*arguments)
    assert all(word in str(error.value) for word in right)


# ---- 6. Settings -----------------------------------------------------------------------------
HERE = Path(official.__file__).parent


@parametrize("preset, shape, millions", [
    ("digits", (1, 16, 16), 0.7),
    ("mnist", (1, 32, 32), 2.7),
    ("cifar10-cpu", (3, 32, 32), 6.1),
    ("cifar10", (3, 32, 32), 39),
])  # fmt: skip
def test_preset_fits_its_images_and_trains_a_network_of_the_size_in_the_readme(
    pd, preset, shape, millions
):
    images = torch.zeros(4, *shape, dtype=torch.uint8)
    device = "cuda" if preset == "cifar10" else "cpu"
    assert pd.preset_for(images, device) == preset
    model = pd.build(pd.chosen(pd.Settings, pd.PRESETS[preset]), shape[0])
    assert numbers(model).numel() == approx(1e6 * millions, rel=0.1)
    assert f"{millions} M" in (HERE / "README.md").read_text(encoding="utf-8")
    assert np.isfinite(pd.train(model, images, 2, batch_size=2)).all()


def test_plan_is_short_for_early_students_and_long_for_the_last_ones(pd):
    settings = pd.Settings(lr=0.5, student_updates=10, student_lr=0.1, early=0.35)
    assert settings.plan(256) == ("teacher", 1500, 0.5)
    assert settings.plan(17) == ("student-17", 4, approx(0.035))
    assert settings.plan(16) == ("student-16", 10, 0.1)
    assert settings.plan(3) == ("student-3", 10, 0.1)
    assert settings.plan(2) == ("student-2", 20, 0.1)


def test_eps_is_weighted_by_the_snr_and_all_else_by_the_truncated_snr(pd):
    """Table 1: ε with truncated SNR diverges."""
    assert pd.Settings(param="eps").weighting == "snr"
    assert pd.Settings(param="x").weighting == "truncated"


# ---- 7. Network ------------------------------------------------------------------------------
def numbers(model):
    return torch.cat([weight.detach().flatten() for weight in model.parameters()])


def unet(pd, channels=1, **options):
    """A small network with no zero layer, as after training."""
    settings = pd.Settings(**{"width": 8, "attention": (1, 2), **options})
    net = pd.UNet(channels, settings)
    for weight in net.parameters():
        wave = torch.arange(weight.numel()).add(1).sin()
        weight.data = 0.4 * wave.reshape(weight.shape)
    return net.eval()


def test_unet_starts_at_zero(pd):
    net = pd.UNet(1, pd.Settings())
    assert net(torch.randn(2, 1, 8, 8), torch.rand(2)).abs().max() == 0


def test_unet_takes_any_size_and_reads_old_checkpoints_as_before(pd):
    """Update the number if you change the network on purpose."""
    z = torch.arange(2 * 3 * 9 * 9).sin().reshape(2, 3, 9, 9)
    net = unet(pd, 3, mults=(1, 2, 2), attention=(2,), blocks=2, patch=2, param="both")
    out = net(z, torch.tensor([0.2, 0.7]))
    assert out.shape == (2, 6, 9, 9)
    assert out.abs().mean().item() == approx(0.5621, rel=1e-3)


def test_attention_is_where_it_is_asked_for_and_fits_the_fused_kernels(pd, monkeypatch):
    """q, k and v have four dimensions: twice on the way up, once down, once in the middle."""
    fused = Mock(side_effect=nn.functional.scaled_dot_product_attention)
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", fused)
    unet(pd, attention=(2,))(torch.randn(3, 1, 8, 8), torch.rand(3))
    shapes = {x.shape for call in fused.call_args_list for x in call.args}
    assert fused.call_count == 4
    assert shapes == {(3, 1, 16, 16)}  # batch, heads, places, channels


def test_dropout_acts_in_training_only(pd):
    net = unet(pd, dropout=0.5)
    z, t = torch.randn(2, 1, 8, 8), torch.rand(2)
    assert torch.equal(net(z, t), net(z, t))
    net.train()
    assert not torch.equal(net(z, t), net(z, t))


def test_bfloat16_stays_inside_the_network(pd):
    net = unet(pd)
    z, t = torch.randn(4, 1, 8, 8), torch.rand(4)
    exact_out = net(z, t)
    net.use_bfloat16 = True
    out = net(z, t)
    assert out.dtype == torch.float32
    assert 0 < (out - exact_out).norm() < 0.1 * exact_out.norm()


# ---- 8. Data ---------------------------------------------------------------------------------
GREY = np.random.default_rng(0).integers(0, 256, (3, 6, 9), np.uint8)
COLOUR = np.random.default_rng(1).integers(0, 256, (6, 9, 3), np.uint8)


def save(file, array, **options):
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(file, **options)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_folder_of_grey_images_has_one_channel_and_every_pixel(pd, here):
    for i, array in enumerate(GREY):
        save(f"d/{i}.png", array)
    images = pd.load_dataset("d")
    assert (images.dtype, images.shape) == (torch.uint8, (3, 1, 6, 9))
    assert (images[:, 0].numpy() == GREY).all()


def test_folder_may_have_subfolders_and_one_image_in_colour_makes_all_rgb(pd, here):
    save("d/a/0.png", GREY[0])
    save("d/a/deeper/1.png", COLOUR)
    images = pd.load_dataset("d").permute(0, 2, 3, 1).numpy()
    assert (images[0] == GREY[0][..., None]).all()
    assert (images[1] == COLOUR).all()


def test_size_takes_the_centre_of_images_of_any_size(pd, here):
    wide = np.zeros((8, 16), np.uint8)
    wide[:, 4:12] = 200
    save("d/0.png", wide)
    save("d/1.png", wide.T)
    images = pd.load_dataset("d", size=4)
    assert images.shape == (2, 1, 4, 4)
    assert images[..., 1:-1].float().mean() > 190


def test_photo_is_upright(pd, here):
    """As the phone says that took it: EXIF orientation 6 is a quarter turn clockwise."""
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in "ab":
        save(f"d/{name}.png", COLOUR, exif=exif)
    image = pd.load_dataset("d")[0].permute(1, 2, 0).numpy()
    assert (image == np.rot90(COLOUR, -1)).all()


@parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_are_white(pd, here, mode):
    image = Image.new("RGBA", (2, 1), "black")
    image.putpixel((1, 0), (0, 0, 0, 0))
    Path("d").mkdir()
    for name in "ab":
        image.convert(mode).save(f"d/{name}.png")
    assert pd.load_dataset("d")[0, 0].tolist() == [[0, 255]]


def test_hidden_and_other_files_are_skipped_and_links_followed(pd, here):
    for i in range(3):
        save(f"elsewhere/{i}.png", GREY[i])
    save("d/.ipynb_checkpoints/a-checkpoint.png", GREY[0])
    save("d/.hidden.png", GREY[0])
    Path("d/readme.txt").write_text("no image")
    Path("d/broken.png").symlink_to("nowhere")
    Path("d/class").symlink_to(Path("elsewhere").resolve())
    assert (pd.load_dataset("d")[:, 0].numpy() == GREY).all()


def test_all_damaged_files_are_named_at_once(pd, here):
    save("d/deep.png", GREY[0].astype(np.uint16))
    for i in range(3):
        save(f"d/good{i}.png", GREY[i])
        Path(f"d/bad{i}.png").write_text("no image")
    with pytest.raises(ValueError, match=r"bad0.png.*bad1.png.*bad2.png.*deep.png.*8 bits"):
        pd.load_dataset("d")


def test_digits_are_rounded_from_17_levels(pd):
    from sklearn.datasets import load_digits

    images = pd.load_dataset("digits")
    check(images[:, 0] / 255, torch.tensor(load_digits().images) / 16, "a pixel", atol=0.002)


@parametrize(
    "name, kind", [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST"), ("cifar10", "CIFAR10")]
)
def test_torchvision_has_the_other_data_sets(pd, monkeypatch, name, kind):
    source = Mock(return_value=[(Image.fromarray(COLOUR), 7)])
    monkeypatch.setattr(f"torchvision.datasets.{kind}", source)
    images = pd.load_dataset(name, "folder").permute(0, 2, 3, 1).numpy()
    source.assert_called_once_with("folder", download=True)
    assert (images[0] == COLOUR).all()


# ---- 9. Training -----------------------------------------------------------------------------
def small(pd):
    return pd.build(pd.Settings(width=8), 1)


GREYS = torch.arange(256, dtype=torch.uint8).reshape(16, 1, 1, 16)  # 16 images of 1x16 pixels


def batches(pd, monkeypatch, **options):
    """(x, ε, t) that `train` hands to `training_loss` in 50 updates, and what else it does."""
    watched = Mock(side_effect=pd.training_loss)
    monkeypatch.setattr(pd, "training_loss", watched)
    pd.train(small(pd), GREYS, 50, **options)
    calls = [call.args for call in watched.call_args_list]
    _, x, eps, t, *_ = zip(*calls)
    return torch.cat(x), torch.cat(eps), torch.cat(t), calls[0][4:]


@parametrize("flip, kinds", [(False, 16), (True, 32)])
def test_training_sees_all_images_and_if_asked_their_mirror_images(pd, monkeypatch, flip, kinds):
    """equally often, from -1 for black to 1 for white"""
    x, *_ = batches(pd, monkeypatch, flip=flip)
    right = torch.cat([GREYS, GREYS.flip(-1)]) / 127.5 - 1
    seen = ((x[:, None] - right).abs() < 1e-6).flatten(2).all(2)
    assert seen.any(0).sum() == kinds
    assert seen.sum(0).max() < 2 * len(x) / kinds


@parametrize("teacher, steps", [(None, None), (two_points, 4)])
def test_training_has_normal_noise_and_times_of_a_teacher_or_student(
    pd, monkeypatch, teacher, steps
):
    options = {"teacher": teacher, "steps": steps, "substeps": 3}
    _, eps, t, rest = batches(pd, monkeypatch, **options)
    check(eps.mean(), 0.0, "the mean of ε", atol=0.05)
    check(eps.std(), 1.0, "the deviation of ε", atol=0.05)
    assert rest == ("truncated", teacher, steps, 3)
    if teacher:
        assert t.unique().tolist() == [0.25, 0.5, 0.75, 1]
    else:
        check(t.sort().values, torch.linspace(0, 1, len(t)), "a sorted time", atol=0.02)


def updates_of(pd, **options):
    """[(learning rate, norm of the gradient, weights after it)] of 61 updates, and the model."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    def after_step(optimizer, args, kwargs):
        gradient = torch.cat([weight.grad.flatten() for weight in model.parameters()])
        rate = optimizer.param_groups[0]["lr"]
        rows.append((float(rate), gradient.norm().item(), numbers(model)))

    rows = []
    model = pd.Denoiser(PointNet())
    with register_optimizer_step_post_hook(after_step):
        pd.train(model, 30 * ring(64), 61, 0.01, warmup=6, decay=0.5, ema=0.8, **options)
    return rows, model


def test_teachers_rate_rises_stays_and_falls_and_gradients_are_clipped_at_1(pd):
    rows, _ = updates_of(pd)
    rates, norms, _ = zip(*rows)
    rising = [0.01 * (n + 1) / 6 for n in range(6)]
    falling = [0.01 * min(1, (1 - n / 61) / 0.5) for n in range(6, 61)]
    assert rates == approx(rising + falling)
    assert max(norms) == approx(1, abs=1e-3)


def test_teacher_ends_as_the_moving_average_of_its_weights(pd):
    """The decay rate is smaller at first, so that the start is soon forgotten."""
    average = numbers(PointNet())
    torch.manual_seed(0)  # as at the start of the test: the same first weights
    rows, model = updates_of(pd)
    for n, (_, _, weights) in enumerate(rows):
        decay = min(0.8, (n + 1) / (n + 10))
        average = decay * average + (1 - decay) * weights
    check(numbers(model), average, "a weight", atol=1e-6)


def test_student_rate_falls_from_the_start_and_last_weights_are_kept(pd):
    rows, model = updates_of(pd, teacher=always(2.0), steps=4)
    rates, _, weights = zip(*rows)
    assert rates == approx([0.01 * (1 - n / 61) for n in range(61)])
    assert torch.equal(numbers(model), weights[-1])


def test_training_has_dropout_for_the_teacher_only(pd):
    """A model that gives targets never has it."""

    def train(**options):
        modes = []
        model = small(pd)
        model.register_forward_hook(lambda model, z, out: modes.append(model.training))
        pd.train(model, GREYS, 1, **options)
        return model, modes

    teacher, modes = train()
    assert (modes, teacher.training) == ([True], False)
    student, modes = train(teacher=teacher, steps=2)
    assert (modes, student.training) == ([False], False)


def test_train_weights_the_loss_as_the_model_predicts(pd):
    """An ε-model has the SNR by default: w ‖x - x̂‖² is ‖ε - ε̂‖², here ‖ε‖², about 1."""
    model = pd.Denoiser(small(pd).net, "eps")
    nn.init.zeros_(model.net.output[-1].weight)
    assert pd.train(model, GREYS, 1, batch_size=256) == approx([1], rel=0.1)


def test_training_depends_on_its_seed_steps_and_settings_alone(pd):
    """It also leaves torch's random numbers as they were."""

    def loss(**options):
        options = {"teacher": two_points, "steps": 4, **options}
        return pd.train(small(pd), GREYS, 3, **options)[-1]

    state = torch.get_rng_state()
    one = loss()
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(1)
    assert loss() == one
    others = {"seed": 1}, {"steps": 8}, {"batch_size": 16}, {"weighting": "constant"}
    assert len({one, *[loss(**other) for other in others]}) == 5


# ---- 10. Evaluation --------------------------------------------------------------------------
def test_generate_samples_from_normal_noise_and_returns_pixels(pd, monkeypatch):
    """other noise in each chunk and for another seed"""
    monkeypatch.setattr(pd, "CHUNK", 4)
    model = Mock(side_effect=denoiser(lambda z, alpha, sigma: 2 * z))
    images = pd.generate(model, 9, (1, 2, 2), 1)
    noise = torch.cat([call.args[0] for call in model.call_args_list])
    check(noise.std(), 1.0, "the deviation", atol=0.3)
    assert len(noise.unique()) == noise.numel()
    x = pd.sample(model, noise[:9], 1).clamp(-1, 1)
    assert torch.equal(images, ((x + 1) * 127.5).round().byte())
    assert not torch.equal(images, pd.generate(model, 9, (1, 2, 2), 1, seed=1))


def test_generate_passes_steps_sampler_and_clip_on_and_leaves_the_random_state(pd, monkeypatch):
    draw = Mock(side_effect=pd.sample)
    monkeypatch.setattr(pd, "sample", draw)
    state = torch.get_rng_state()
    pd.generate(two_points, 2, (2,), 3, "ancestral", clip=True)
    assert draw.call_args.args[2:] == (3, "ancestral", True)
    assert torch.equal(torch.get_rng_state(), state)


@parametrize("sampler", SAMPLERS)
def test_generate_draws_the_same_first_images_whatever_their_number(pd, monkeypatch, sampler):
    monkeypatch.setattr(pd, "CHUNK", 4)
    five, six, nine = [pd.generate(two_points, n, (2,), 3, sampler) for n in (5, 6, 9)]
    assert torch.equal(six[:5], five)
    assert torch.equal(nine[:5], five)


def test_features_are_the_spatial_means_of_the_bottleneck(pd, monkeypatch):
    """of images scaled by α_t at t = 0.1"""
    monkeypatch.setattr(pd, "CHUNK", 4)
    net = unet(pd)
    images = torch.randint(256, (6, 1, 8, 8), dtype=torch.uint8)
    z = exact(0.1, images)[0].float() * (images / 127.5 - 1)
    bottleneck, *_ = net.encode(z, torch.full((6,), 0.1))
    check(pd.features(net, images), bottleneck.mean((2, 3)), "a feature", rtol=1e-3)


def test_frechet_distance_has_the_closed_form_of_normal_distributions(pd):
    """A shift by 2 in 3 dimensions is 12; 3 a against a is (3 - 1)² tr C."""
    a = torch.randn(500, 3) @ torch.randn(3, 3)
    a -= a.mean(0)
    assert pd.frechet_distance(a, a + 2) == approx(12, rel=1e-4)
    assert pd.frechet_distance(3 * a, a) == approx(4 * a.var(0).sum().item(), rel=1e-4)


# ---- 11. A run -------------------------------------------------------------------------------
TINY = (
    "--width 8 --teacher-updates 12 --student-updates 5 --stages 2 --batch-size 8 "
    "--eval-samples 30 --device cpu --dropout 0 --no-bfloat16 --dataset"
).split()
MODELS = "teacher", "student-2", "student-1"


def command(pd, *flags):
    """The exit status of a command, in this process."""
    try:
        pd.main([str(flag) for flag in flags])
    except SystemExit as end:
        return end.code
    return 0


def refused(pd, capsys, *flags):
    """The last line that wrong input leaves on stderr."""
    assert command(pd, *flags) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("pd.py: error: ")
    return error


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A folder of 20 small images."""
    folder = tmp_path_factory.mktemp("data") / "images"
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 6), np.uint8)
    for i, image in enumerate(images):
        save(folder / f"{i:02}.png", image)
    return folder


@pytest.fixture(scope="session")
def ladder(module, folder, tmp_path_factory):
    """(its folder, the calls of training_loop) of a whole run, 4 -> 2 -> 1 steps."""
    out = tmp_path_factory.mktemp("runs") / "ladder"
    with pytest.MonkeyPatch.context() as patch:
        loop = Mock(side_effect=module.training_loop)
        patch.setattr(module, "training_loop", loop)
        patch.setattr(module, "LOG_EVERY", 5)
        assert command(module, *TINY, folder, "--out", out) == 0
    return out, [call.args for call in loop.call_args_list]


@pytest.fixture
def run(ladder):
    return ladder[0]


@pytest.fixture
def tiny_run(folder, tmp_path):
    """Flags: a small run in tmp_path."""
    return [*TINY, folder, "--out", tmp_path]


@pytest.fixture
def copied(run, tmp_path):
    """tmp_path, with a copy of the whole run."""
    return shutil.copytree(run, tmp_path, dirs_exist_ok=True)


def weights_of(run):
    return torch.cat([numbers(official.load_model(run / f"{name}.pt")[0]) for name in MODELS])


def contents(folder):
    return {file: file.is_dir() or file.read_bytes() for file in folder.rglob("*")}


def test_run_keeps_a_teacher_and_students_each_taught_by_the_previous_model(pd, ladder):
    run, calls = ladder
    before = None
    for (training, _, updates, *_, teacher, steps), name in zip(calls, MODELS):
        model, checkpoint = pd.load_model(run / f"{name}.pt")
        assert torch.equal(numbers(model), numbers(training.model))
        assert checkpoint["updates"] == updates == (10 if teacher else 12)
        assert checkpoint["seconds"] > 0
        assert checkpoint["steps"] == (steps or 4)
        assert teacher is before
        before = training.model


def test_log_has_the_mean_loss_at_regular_intervals(pd, run, folder):
    """It is the loss that `train` has with the same settings."""
    rows = [line.split(",") for line in (run / "log.csv").read_text().split()]
    assert rows[-1][0] == "student-1"
    assert [row[1] for row in rows] == "update 5 10 12 5 10 5 10".split()
    settings = pd.load_model(run / "teacher.pt")[1]["settings"]
    model = pd.build(pd.Settings(**settings), 1)
    losses = pd.train(model, pd.load_dataset(str(folder)), 12, **settings)
    assert float(rows[2][2]) == approx(np.mean(losses[5:10]), rel=1e-4)


def test_results_compare_a_student_with_the_teacher(pd, run, folder):
    """in the teacher's features, and in its images of all steps"""

    def draw(model, *how):
        return pd.generate(model, 30, (1, 8, 6), *how)

    def distance(drawn):
        return pd.frechet_distance(real, pd.features(teacher.net, drawn))

    teacher, _ = pd.load_model(run / "teacher.pt")
    student, checkpoint = pd.load_model(run / "student-2.pt")
    real = pd.features(teacher.net, pd.load_dataset(str(folder)))
    change = (draw(student, 2).float() - draw(teacher, 4)) / 127.5
    right = {
        "steps": 2,
        "distilled": distance(draw(student, 2)),
        "ddim": distance(draw(teacher, 2)),
        "ancestral": distance(draw(teacher, 2, "ancestral")),
        "drift": change.square().mean().sqrt().item(),
        "updates": 10,
        "seconds": checkpoint["seconds"],
    }
    results = json.loads((run / "results.json").read_text())
    assert results["rows"][1] == approx(right, rel=1e-3)


def test_same_command_changes_nothing_whatever_the_folder_is_called(
    pd, folder, tiny_run, copied, monkeypatch
):
    monkeypatch.chdir(folder.parent)
    before = contents(copied)
    for name in folder, "images", "images/":
        assert command(pd, *tiny_run, "--dataset", name) == 0
        assert contents(copied) == before


def test_changed_settings_or_images_are_named_and_need_restart(pd, tiny_run, copied, capsys):
    before = contents(copied)
    flags = [*tiny_run, "--width", 16, "--stages", 1]
    error = refused(pd, capsys, *flags)
    assert "width 8, not 16: use these settings" in error
    assert "images 20 with" in refused(pd, capsys, *tiny_run, "--dataset", "digits")
    assert contents(copied) == before
    assert command(pd, *flags, "--restart") == 0
    assert len([*copied.glob("*.pt")]) == 2


@parametrize("name", ["teacher", "student-2"])
def test_checkpoint_under_the_name_of_another_is_refused(pd, tiny_run, copied, capsys, name):
    shutil.copy(copied / "student-1.pt", copied / f"{name}.pt")
    error = refused(pd, capsys, *tiny_run)
    assert f"holds the student-1, not the {name}" in error


def test_results_of_other_models_are_renewed(pd, tiny_run, copied):
    for file in copied.glob("student-*.pt"):
        file.unlink()
    assert command(pd, *tiny_run, "--stages", 0) == 0
    rows = json.loads((copied / "results.json").read_text())["rows"]
    assert [row["steps"] for row in rows] == [1]


def test_restart_keeps_the_given_teacher_until_it_is_replaced(
    pd, run, tiny_run, copied, monkeypatch
):
    monkeypatch.setattr(os, "fsync", Mock(side_effect=KeyboardInterrupt))
    given = copied / "teacher.pt"
    assert command(pd, *tiny_run, "--teacher", given, "--restart") == 130
    assert given.read_bytes() == (run / "teacher.pt").read_bytes()


@parametrize("flags", [[], ["--teacher", "run/teacher.pt", "--restart"]])
def test_teacher_may_have_other_students(pd, run, tiny_run, here, flags):
    """with a copy of the teacher in a new folder, or by --teacher"""
    Path("run").mkdir()
    shutil.copy(run / "teacher.pt", "run")
    flags = ["--out", "run", "--stages", 1, "--student-updates", 2, *flags]
    assert command(pd, *tiny_run, *flags) == 0
    assert Path("run/teacher.pt").read_bytes() == (run / "teacher.pt").read_bytes()
    assert pd.load_model("run/student-1.pt")[1]["updates"] == 4


def test_run_killed_at_ten_moments_ends_with_the_same_weights(
    pd, run, tiny_run, tmp_path, monkeypatch
):
    """before an update, while saving, before the rename; by Ctrl-C or by exit"""

    def count_calls(place, name):
        def call(*arguments, **options):
            moments.append(name)
            if len(moments) == last:
                if name == "save":
                    arguments[1].write(b"half of it")
                raise end
            return function(*arguments, **options)

        function = getattr(place, name)
        monkeypatch.setattr(place, name, call)

    count_calls(pd, "set_seed")
    count_calls(torch, "save")
    count_calls(os, "replace")
    monkeypatch.setattr(pd, "SAVE_EVERY", 0)
    monkeypatch.setattr(pd, "LOG_EVERY", 2)
    ends = 5 * [KeyboardInterrupt(), SystemExit(-9)]
    for last, end in enumerate(ends, start=7):
        moments = []
        status = command(pd, *tiny_run)
        assert status in (130, -9)
    last = 0
    assert command(pd, *tiny_run) == 0
    assert torch.equal(weights_of(tmp_path), weights_of(run))


@parametrize("moment", [5, 6])
def test_run_killed_between_log_and_model_has_a_whole_log(
    pd, run, tiny_run, tmp_path, monkeypatch, moment
):
    """The last model and its log are the fifth and sixth file to be written."""
    replace = os.replace
    ends = [replace] * (moment - 1) + [Mock(side_effect=KeyboardInterrupt)]
    monkeypatch.setattr(pd, "LOG_EVERY", 5)
    monkeypatch.setattr(os, "replace", lambda *paths: ends.pop(0)(*paths))
    assert command(pd, *tiny_run) == 130
    monkeypatch.setattr(os, "replace", replace)
    assert command(pd, *tiny_run) == 0
    assert (tmp_path / "log.csv").read_text() == (run / "log.csv").read_text()


def test_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_save(
    pd, tiny_run, tmp_path, monkeypatch, capsys
):
    loss = pd.training_loss
    factors = [1, 1, 1, 1, 1, math.nan]
    monkeypatch.setattr(pd, "training_loss", lambda *inputs: factors.pop(0) * loss(*inputs))
    monkeypatch.setattr(pd, "SAVE_EVERY", 0)
    monkeypatch.setattr(pd, "LOG_EVERY", 2)
    error = refused(pd, capsys, *tiny_run)
    assert "loss of teacher is not finite at update 6: lower --lr" in error
    assert pd.load_model(tmp_path / "teacher.pt")[1]["updates"] == 4


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs torchrun")
def test_two_processes_train_the_model_of_one(pd, run, tiny_run, tmp_path):
    line = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
    line = [sys.executable, *line, pd.__file__, *tiny_run]
    process = subprocess.run(line, capture_output=True, text=True, timeout=400)
    assert process.stdout.count("is finished") == 1, process.stderr  # one process speaks
    one, two = weights_of(run), weights_of(tmp_path)
    assert (one - two).norm() < 1e-5 * one.norm()


def test_whole_run_compiles_the_network_three_times(pd, tiny_run, monkeypatch):
    """Gradients of a teacher and of students; no gradients (targets and samples of one size)."""

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    graphs = []
    torch._dynamo.reset()
    compile_net = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda net: compile_net(net, backend=backend))
    monkeypatch.setattr(pd, "CHUNK", 8)
    assert command(pd, *tiny_run, "--compile") == 0
    assert len(graphs) == 3


@parametrize("triton, shape, fast", [
    (None, (3, 32, 8), False),
    ("there", (3, 32, 8), True),
    ("there", (3, 16, 16), False),
])  # fmt: skip
def test_cuda_compiles_for_large_images_where_triton_is(pd, monkeypatch, triton, shape, fast):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: triton)
    monkeypatch.setattr(pd, "is_fast_in_bfloat16", Mock())
    model = Mock()
    pd.prepare(model, pd.Options(device="cuda"), shape)
    assert model.net.compile.called == fast


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@needs_cuda
@parametrize("flag", ["--no-compile", "--compile"])
def test_cuda_trains_and_draws_what_the_cpu_draws(pd, tiny_run, tmp_path, flag):
    assert command(pd, *tiny_run, "--device", "cuda", "--bfloat16", flag) == 0
    model, _ = pd.load_model(tmp_path / "student-1.pt")
    z = torch.randn(16, 1, 8, 8)
    on_cpu = pd.sample(model, z, 1)
    model.net.use_bfloat16 = True
    on_cuda = pd.sample(model.to("cuda"), z.to("cuda"), 1).cpu()
    assert (on_cuda - on_cpu).std() < 0.05 * on_cpu.std()


@needs_cuda
def test_cuda_has_fast_kernels_for_the_attention(pd):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    net = unet(pd, width=32).to("cuda")
    net.use_bfloat16 = True
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
        net(torch.randn(4, 1, 8, 8, device="cuda"), torch.rand(4, device="cuda"))


# ---- 12. Command line ------------------------------------------------------------------------
@parametrize("flags, words", [
    ("--dataset nothing", "nothing is neither one of digits, "),
    ("--dataset mixed", "2 sizes: give --size"),
    ("--dataset mixed --out mixed/run", "must not be in the folder of the images"),
    ("--dataset mnist", "neither in data nor can it be downloaded"),
    ("--device tpu", "--device"),
    ("--out damaged", "damaged/teacher.pt cannot be read"),
    ("--out file", "File exists"),
    ("--teacher missing.pt", "missing.pt cannot be read as a checkpoint"),
    ("--stages 9 --substeps 3", "must be at most 8192"),
    ("--teacher MODEL", "student-2.pt is not a teacher"),
    ("--mults", "expected at least one argument"),
    ("--num 3", "--num cannot be used without --sample"),
    ("--attention 3", "--attention must be some of [1, 2], not (3,)"),
    ("--lr 0", "--lr must be above 0"),
    ("--lr nan", "--lr must be from 0 to 1, not nan"),
    ("--batch-size 0", "--batch-size must be at least 1, not 0"),
    ("--sample MODEL --lr 1", "--lr cannot be used with --sample"),
    ("--sample MODEL --sampler heun", "invalid choice: 'heun'"),
    ("--sample MODEL --out x.jpg", "must end in .png, or be a new folder"),
    ("--sample MODEL --out mixed", "mixed already exists"),
    ("--sample missing.pt", "missing.pt cannot be read as a checkpoint"),
    ("--sample half.pt", "half.pt cannot be read as a checkpoint"),
    ("--sample evil.pt", "evil.pt cannot be read as a checkpoint"),
])  # fmt: skip
def test_wrong_input_ends_with_one_line_and_writes_nothing(
    pd, run, here, monkeypatch, capsys, flags, words
):
    save("mixed/0.png", GREY[0])
    save("mixed/1.png", GREY[0].T)
    Path("damaged").mkdir()
    Path("damaged/teacher.pt").write_text("somebody's")
    Path("file").write_text("a file")
    Path("evil.pt").write_text("cos\nmkdir\n(S'evil'\ntR.")  # calls os.mkdir("evil")
    Path("half.pt").write_bytes((run / "teacher.pt").read_bytes()[:9000])
    no_network = Mock(side_effect=OSError("no network"))
    monkeypatch.setattr("torchvision.datasets.MNIST", no_network)
    monkeypatch.setattr(pd, "training_loop", None)  # nothing is trained before
    before = contents(Path())
    assert words in refused(pd, capsys, *flags.replace("MODEL", f"{run}/student-2.pt").split())
    assert contents(Path()) == before


def test_flags_are_checked_together_with_the_preset(pd, tiny_run):
    """The preset's network has a level 4, but the default one does not."""
    assert command(pd, *tiny_run, "--preset", "mnist", "--attention", 4, "--stages", 0) == 0


def sample_flags(run, *flags):
    return ["--sample", run / "student-2.pt", "--num", 5, "--device", "cpu", *flags]


def test_sample_writes_a_folder_of_what_generate_draws(pd, run, here, capsys):
    flags = ["--steps", 3, "--sampler", "ancestral", "--clip", "--seed", 7, "--out", "deep/er"]
    assert command(pd, *sample_flags(run, *flags)) == 0
    assert "trained for --steps 2" in capsys.readouterr().out
    model, _ = pd.load_model(run / "student-2.pt")
    right = pd.generate(model, 5, (1, 8, 6), 3, "ancestral", 7, clip=True)
    drawn = [np.asarray(Image.open(file)) for file in sorted(Path("deep/er").iterdir())]
    assert (np.stack(drawn)[..., 0] == right[:, 0].numpy()).all()


def test_sample_writes_a_grid_with_the_models_own_steps(pd, run, here, capsys):
    assert command(pd, *sample_flags(run, "--out", "grid.PNG")) == 0
    assert "trained for" not in capsys.readouterr().out
    model, _ = pd.load_model(run / "student-2.pt")
    right = pd.image_grid(pd.generate(model, 5, (1, 8, 6), 2), 3)
    assert (np.asarray(Image.open("grid.PNG")) == right).all()


def test_interrupted_sample_leaves_nothing(pd, run, here, monkeypatch, capsys):
    monkeypatch.setattr("torchvision.utils.save_image", Mock(side_effect=[0, KeyboardInterrupt]))
    assert command(pd, *sample_flags(run, "--out", "new")) == 130
    assert "nothing was written" in capsys.readouterr().err
    assert contents(Path()) == {}


@parametrize("error", [
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
])  # fmt: skip
def test_out_of_memory_is_one_line(pd, monkeypatch, capsys, error):
    monkeypatch.setattr(pd, "load_dataset", Mock(side_effect=error))
    assert "out of memory: use smaller" in refused(pd, capsys)


def test_bug_in_pd_is_not_called_out_of_memory(pd, monkeypatch):
    monkeypatch.setattr(pd, "load_dataset", Mock(side_effect=NotImplementedError("memory")))
    with pytest.raises(NotImplementedError):
        pd.main([])


def test_notebook_may_run_the_file_with_its_own_stdout(monkeypatch):
    """%run pd.py: the stdout of a notebook cannot be reconfigured."""
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys, "argv", ["pd.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(official.__file__, run_name="__main__")
    assert "Progressive Distillation" in sys.stdout.getvalue()


def test_help_explains_every_flag(pd, capsys):
    assert command(pd, "--help") == 0
    text = capsys.readouterr().out
    for name in pd.names_of(pd.Settings, pd.RunOptions, pd.SampleOptions):
        assert re.search(rf"\n  {pd.flag_of(name)}\b.*\s+[a-z-]+ [a-z]", text), name


# ---- Classroom kit: hand it out, grade it, hunt the bug --------------------------------------
SOURCE = Path(official.__file__).read_text(encoding="utf-8")


def write_new(file, text):
    with open(file, "x", encoding="utf-8") as out:  # never over somebody's work
        out.write(text)


def text_without(names):
    """The text of pd.py with these functions left to be written."""
    lines = SOURCE.splitlines()
    for node in reversed(ast.parse(SOURCE).body):
        if isinstance(node, ast.FunctionDef) and node.name in names:
            docstring = node.body[0]
            todo = f'    raise NotImplementedError("{node.name}")'
            lines[docstring.end_lineno : node.end_lineno] = [todo]
    text = "\n".join(lines) + "\n"
    if "loss_weight" in names:
        text = re.sub("lambda snr: .*", "None,", text)
    return text


def handout(file, only):
    write_new(file, text_without(only))


def graded_by(name):
    """The names of an exercise's tests, in the order of this file."""
    mark = exercise(name).mark
    tests = globals().items()
    return [test for test, function in tests if mark in getattr(function, "pytestmark", [])]


def in_a_process(arguments, file, seconds):
    """Run pytest where a crash does no harm, for at most this many seconds."""
    environment = os.environ | {"PD_FILE": str(file), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", *arguments]
    with contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(command, env=environment, capture_output=True, timeout=seconds)


def report_on(file, names=HINTS, seconds=10):
    """What pytest reports on these exercises of a file, as JUnit XML.

    A test may take this many seconds, and a file twelve times as many.
    """
    tests = [test for name in names for test in graded_by(name)]
    report = ElementTree.Element("testsuites")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "report.xml")
        arguments = [f"{__file__}::{test}" for test in tests]
        arguments += ["--tb=short", "--show-capture=no", f"--junitxml={path}"]
        arguments += [f"--timeout={seconds}", f"--session-timeout={12 * seconds}"]
        in_a_process(arguments, file, 18 * seconds)
        if path.exists():
            report = ElementTree.parse(path).getroot()
    answered = {name_of(case) for case in report.iter("testcase")}
    for test in tests:
        if test not in answered:
            suite = ElementTree.SubElement(report, "testsuite", name="no answer")
            case = ElementTree.SubElement(suite, "testcase", classname="test_pd", name=test)
            words = "no result: Python crashed, or time ran out"
            ElementTree.SubElement(case, "error", message=words).text = words
    return report


def name_of(case):
    return case.get("name", "").split("[")[0]


def what_is_wrong(case, file):
    """The property, the message, and the last line of the student's that ran."""
    failure = [*case.iter("failure"), *case.iter("error")][0]
    message = failure.get("message").removeprefix("AssertionError: ")
    message = " ".join(message.split("\nassert")[0].split())
    if "NotImplementedError" in message:
        return "not filled in yet"
    test = globals()[name_of(case)]
    text = f"{case.get('name').replace('_', ' ')} ({test.__doc__}): {message}"
    lines = re.findall(rf"{re.escape(Path(file).name)}:(\d+): in .*\n(.*)", failure.text)
    if lines:
        number, line = lines[-1]
        text += f", line {number}: {line.strip()}"
    return text


def result_of(name, report, file):
    """(number of tests, how many pass, what is first wrong) of an exercise."""
    tests = graded_by(name)
    failed = [case for case in report.iter("testcase") if len(case) and name_of(case) in tests]
    passed = len(tests) - len({name_of(case) for case in failed})
    return len(tests), passed, what_is_wrong(failed[0], file) if failed else ""


def grade(files, junitxml):
    for file in files:
        file.read_bytes()  # an error here, before any is graded
    for file in files:
        report = report_on(file)
        results = {name: result_of(name, report, file) for name in HINTS}
        tests, points, _ = zip(*results.values())
        print(f"{file}: {sum(points)} of {sum(tests)} points")
        for name, (tests, passed, wrong) in results.items():
            print(f"    {name:15} {passed}/{tests}  {wrong}", flush=True)
        if junitxml:
            junitxml.mkdir(exist_ok=True)
            name = re.sub(r"\W+", "-", str(file))
            ElementTree.ElementTree(report).write(junitxml / f"{name}.xml", "utf-8")


# Mistakes that public code has made, with a symptom that was measured on a ring, with a teacher
# of 8 steps: exercise, what is in pd.py, what is there instead, words of the failure, symptom, why
HUNTS = [
    (
        "distill_target",
        "weighted_sum / (alpha_over_sigma(s) - alpha_over_sigma(t))",
        "x_hat",
        "in one step where the teacher lands",
        "Losses look fine; students of 4 and 2 steps are off by 0.028, 0.059, not 0.006, 0.020.",
        "The second prediction is taken for x̃; a DDIM step with it misses the landing.",
    ),
    (
        "distill_target",
        "(t * (substeps - i) + s * i)",
        "(t * i + s * (substeps - i))",
        "it is asked at t = [0.3, 0.6]",
        "Students are far worse than their teacher: off by 0.67 (4 steps), not 0.006.",
        "The teacher's times are exchanged: it walks from s up to t, not from t down to s.",
    ),
    (
        "loss_weight",
        "snr.clamp(min=1)",
        "snr.clamp(min=0)",
        "at least 1",
        "The loss of a one-step student falls to 6e-10, yet it is off by 0.61, not 0.05.",
        "The weight is the SNR, not truncated: e^-20 at t = 1, where such a student works.",
    ),
    (
        "distill_target",
        "x_hat, eps_hat = teacher(z, start)",
        "x_hat, eps_hat = teacher(z, start)\n        x_hat = x_hat.clamp(-1, 1)",
        "within [-1, 1] or not",
        "The loss of a student of 4 steps is 2e-3, not 6e-5, and it is off by 0.034, not 0.006.",
        "The teacher is clipped in the target, a path it does not take; x̃ may leave [-1, 1].",
    ),
    (
        "sample_times",
        "torch.ceil(t * steps) / steps",
        "torch.floor(t * steps) / steps",
        "is 0, not 1",
        "A student of 4 steps is off by 0.012, not 0.006, one of 1 step by 0.39, not 0.05.",
        "Its times are 0, ..., 1 - 1/N, never t = 1, where its sampler starts.",
    ),
    (
        "training_loss",
        "target = distill_target(teacher, z, t, t - 1 / steps, substeps)",
        "target = x",
        "for data 0.5, student output 0",
        "Losses stay at 0.5, and in one step students are as bad as the teacher: 0.63, 0.64.",
        "x̃ is not used: the student learns the data, whose mean given z is a blur.",
    ),
]


def plant(right, wrong):
    assert SOURCE.count(right) == 1, f"{SOURCE.count(right)} times in pd.py: {right}"
    return SOURCE.replace(right, wrong)


def hunt(number, file, answer):
    _, right, wrong, _, symptom, why = HUNTS[number - 1]
    if file:
        write_new(file, plant(right, wrong))
    print(f"Mistake {number}: {symptom}")
    if answer:
        print(f"{why}\n- {right}\n+ {wrong}")


# ---- Tests of the kit ------------------------------------------------------------------------
@pytest.fixture
def quick(monkeypatch):
    """Grade in this process."""

    def run_pytest(arguments, file, seconds):
        monkeypatch.setenv("PD_FILE", str(file))
        pytest.main(arguments)

    monkeypatch.setitem(globals(), "in_a_process", run_pytest)


def grade_text(folder, text, names=HINTS, **options):
    """{exercise: what is first wrong} in a text."""
    file = folder / "mine.py"
    file.write_text(text, encoding="utf-8")
    report = report_on(file, names, **options)
    wrong = {name: result_of(name, report, file)[2] for name in names}
    return {name: message for name, message in wrong.items() if message}


@parametrize("name, right, wrong, words", [hunt[:4] for hunt in HUNTS] + [
    ("alpha_sigma", "torch.sin(FIRST_ANGLE + span * (1 - t))",
     "torch.cos(FIRST_ANGLE + span * t)", "keep their digits in float32"),
    ("log_snr", "2 * torch.log(alpha / sigma)", "torch.log(alpha / sigma)", "λ_t is 0.88"),
    ("to_x_eps", "alpha * z - sigma * out", "sigma * z - alpha * out", "[v]"),
    ("ddim_step", "return alpha * x_hat + sigma * eps_hat", "alpha * x_hat + sigma * eps_hat",
     "is a `return` missing?"),
    ("ancestral_step", "std = (1 - ratio).sqrt()", "std = (1 - ratio)", "the deviation of z_s is"),
    ("sample", '"ddim" or s == 0', '"ddim"', "no last step"),
    ("sample_times", "torch.rand(1, device=device)", "0.51", "are uniform"),
    ("training_loss", "t - 1 / steps", "t - 0.5 / steps", "asked at t = [0.75, 0.6875], not"),
    ("distill", "teacher = student  # and", "pass  # and", "models are [0, 1, 1, 1]"),
])  # fmt: skip
def test_wrong_answer_is_graded_with_words_that_lead_to_it(
    quick, tmp_path, name, right, wrong, words
):
    found = grade_text(tmp_path, plant(right, wrong), [name])
    assert words in found[name]


def test_blank_handout_has_no_points(quick, tmp_path):
    file = tmp_path / "mine.py"
    main(["handout", str(file)])
    found = grade_text(tmp_path, file.read_text("utf-8"))
    assert found == {name: "not filled in yet" for name in HINTS}


@parametrize("solved", NAMES)
def test_solution_turns_its_own_exercise_green(quick, tmp_path, solved):
    others = [name for name in NAMES if name != solved]
    assert grade_text(tmp_path, text_without(others), [solved]) == {}


def test_endless_loop_costs_one_exercise(tmp_path):
    text = plant("return 2 * torch.log", "while True: pass\n    return 2 * torch.log")
    wrong = grade_text(tmp_path, text, ["log_snr", "ddim_step"], seconds=6)
    assert list(wrong) == ["log_snr"]
    assert re.search(r"Timeout.*line \d+: while True: pass", wrong["log_snr"])


@parametrize("text, words", [
    (b"def f(:", "SyntaxError"),
    (b"import sys; sys.exit()", "sys.exit"),
    (b"caf\xe9 = 1", "utf-8"),
    (b"print('#' * 10**7)", "no attribute"),
    (b"import os; os.abort()", "Python crashed"),
    (b"raise KeyboardInterrupt", "Python crashed"),
])  # fmt: skip
def test_broken_file_gets_no_points(tmp_path, text, words):
    file = tmp_path / "mine.py"
    file.write_bytes(text)
    tests, passed, wrong = result_of("ddim_step", report_on(file, ["ddim_step"]), file)
    assert (tests, passed) == (1, 0)
    assert words in wrong


def test_grades_of_a_class_are_shown_and_kept(quick, here, capsys):
    Path("ada").mkdir()
    main(["handout", "ada/mine.py", "--only", "log_snr"])
    main(["grade", "ada/mine.py", "--junitxml", "class"])
    assert re.search(r"log_snr +0/1  not filled in yet\n", capsys.readouterr().out)
    cases = ElementTree.parse("class/ada-mine-py.xml").iter("testcase")
    failed = {name_of(case) for case in cases if len(case)}
    assert failed == {*graded_by("log_snr"), *graded_by("outcome")}


def test_hunt_plants_a_mistake_and_explains_it_if_asked(tmp_path, capsys):
    file = tmp_path / "strange.py"
    main(["hunt", "3", str(file)])
    assert file.read_text("utf-8") == plant("snr.clamp(min=1)", "snr.clamp(min=0)")
    main(["hunt", "3", "--answer"])
    assert capsys.readouterr().out.count(HUNTS[2][-1]) == 1


@parametrize("command", ["handout", "hunt 1", "grade missing.py", "hint", "hunt 99"])
def test_kit_refuses_nonsense_and_overwrites_nothing(here, command):
    Path("mine.py").write_text("my work")
    with pytest.raises(SystemExit, match="2"):
        main([*command.split(), "mine.py"])
    assert Path("mine.py").read_text() == "my work"


# ---- README and notebook ---------------------------------------------------------------------
def test_readme_names_functions_and_tests_that_exist():
    lines = (HERE / "README.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if "| `test_" in line]
    names = re.findall(r"`(\w+)`", "".join(rows))
    assert names
    assert not [name for name in names if name not in {*globals(), *vars(official)}]


def cells():
    return json.loads((HERE / "tutorial.ipynb").read_text(encoding="utf-8"))["cells"]


def test_notebook_was_run_once_from_top_to_bottom_without_errors_and_warnings():
    code = [cell for cell in cells() if cell["cell_type"] == "code"]
    outputs = [output for cell in code for output in cell["outputs"]]
    kinds = [kind for output in outputs for kind in output.get("data", {})]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    names = {output.get("name", output["output_type"]) for output in outputs}
    assert not names & {"error", "stderr"}
    assert set(kinds) <= {"image/png", "text/plain"}
    assert kinds.count("image/png") <= 22


def test_notebook_is_short():
    assert len(cells()) <= 120
    for cell in cells():
        lines = "".join(cell["source"]).splitlines()
        if cell["cell_type"] == "code":
            assert len(lines) <= 40 or "setup" in tags(cell)
            assert max(map(len, lines), default=0) <= 100


def tags(cell):
    return cell["metadata"].get("tags", [])


def test_exercises_of_the_notebook_fail_unsolved_and_pass_solved(monkeypatch):
    """Cells are tagged setup, exercise:NAME, answer:NAME (which sets ANSWERS) and check:NAME."""
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.chdir(HERE)
    code = {}
    for cell in cells():
        for tag in tags(cell):
            code[tag] = code.get(tag, "") + "".join(cell["source"]) + "\n"
    space = {"__name__": "notebook"}
    exec(code["setup"], space)
    names = [tag.removeprefix("exercise:") for tag in code if tag.startswith("exercise:")]
    assert 8 <= len(names) <= 10
    for name in names:
        exec(code[f"exercise:{name}"], space)
        space["ANSWERS"].clear()
        with pytest.raises(NotImplementedError):
            exec(code[f"check:{name}"], space)
        exec(code[f"answer:{name}"] + code[f"check:{name}"], space)


# ---- Benchmark and seeds ---------------------------------------------------------------------
def speed(job):
    """(seconds, TFLOP/s) of job()."""
    from torch.utils.benchmark import Timer
    from torch.utils.flop_counter import FlopCounterMode

    job()  # torch.compile compiles
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        job()
    timer = Timer("job()", globals={"job": job}, num_threads=torch.get_num_threads())
    seconds = timer.adaptive_autorange(max_run_time=60).median
    return seconds, counter.get_total_flops() / seconds / 1e12


SQUARE = 8192  # a matrix product large enough to reach the best of the machine


def benchmark(flags):
    """print how fast this machine trains and samples, with flags of pd.py"""

    def show(what, num, job):
        seconds, tflops = speed(job)
        print(f"{what:20} {num / seconds:,.0f} images/s, {tflops:.3g} TFLOP/s, {tflops / best:.0%}")

    def train(**more):
        official.train(model, images, 10, batch_size=settings.batch_size, **more)

    def draw():
        official.generate(model, official.CHUNK, shape, 256, device=options.device)

    given = vars(official.make_parser().parse_args(flags))
    options = official.chosen(official.RunOptions, given)
    images = official.load_dataset(options.dataset, options.data_dir, options.size)
    images = images.to(options.device)
    shape = images.shape[1:]
    preset = options.preset or official.preset_for(images, options.device)
    settings = official.chosen(official.Settings, official.PRESETS[preset] | given)
    model = official.prepare(official.build(settings, shape[0]), options, shape)
    teacher = copy.deepcopy(model)
    square = torch.randn(SQUARE, SQUARE, device=options.device)
    if model.net.use_bfloat16:
        square = square.bfloat16()
    _, best = speed(lambda: square @ square)
    print(f"best matrix product: {best:.3g} TFLOP/s; shares of it:")
    show("teacher update", 10 * settings.batch_size, train)
    show("student update", 10 * settings.batch_size, lambda: train(teacher=teacher, steps=4))
    show("sampling, 256 steps", official.CHUNK, draw)


def test_benchmark_measures_training_and_sampling(capsys, monkeypatch):
    half_a_second = Mock(return_value=Mock(median=0.5))
    monkeypatch.setattr("torch.utils.benchmark.Timer.adaptive_autorange", half_a_second)
    monkeypatch.setattr(official, "CHUNK", 2)
    monkeypatch.setitem(globals(), "SQUARE", 8)
    main("benchmark --width 8 --batch-size 4 --device cpu".split())
    assert re.findall(r"(\d+) images/s", capsys.readouterr().out) == ["80", "80", "4"]


def seeds():
    """print raw-pixel Fréchet distances of the digits for three seeds"""
    real = official.load_dataset("digits").flatten(1) / 127.5
    for seed in range(3):
        out = Path(f"runs/seed-{seed}")
        official.main(["--seed", str(seed), "--out", str(out)])
        for name in "teacher", "student-4", "student-2", "student-1":
            model, checkpoint = official.load_model(out / f"{name}.pt")
            drawn = official.generate(model, len(real), (1, 8, 8), checkpoint["steps"], seed=seed)
            distance = official.frechet_distance(real, drawn.flatten(1) / 127.5)
            print(f"seed {seed}, {name:10}: {distance:.3f}")


# ---- Command line of this file ---------------------------------------------------------------
def main(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("handout")
    command.add_argument("file")
    command.add_argument("--only", nargs="+", choices=NAMES, default=NAMES)
    command = commands.add_parser("grade")
    command.add_argument("files", nargs="+", type=Path)
    command.add_argument("--junitxml", type=Path, help="keep the reports here")
    commands.add_parser("hint").add_argument("name", choices=HINTS)
    command = commands.add_parser("hunt")
    command.add_argument("number", type=int, choices=range(1, len(HUNTS) + 1))
    command.add_argument("file", nargs="?")
    command.add_argument("--answer", action="store_true")
    commands.add_parser("benchmark", usage="test_pd.py benchmark [flags of pd.py]")
    commands.add_parser("seeds")
    if argv[:1] == ["benchmark"]:
        return benchmark(argv[1:])
    arguments = vars(parser.parse_args(argv))
    name = arguments.pop("command")
    if name == "hint":
        return print(HINTS[arguments["name"]])
    try:
        globals()[name](**arguments)
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main(sys.argv[1:])
