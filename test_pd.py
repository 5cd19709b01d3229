"""The tests of pd.py, and the classroom kit that is made of them.

    python -m pytest test_pd.py                        # every test
    python test_pd.py handout FILE [--only NAME ...]   # a copy of pd.py with the exercises taken out
    python test_pd.py grade FILE... [--json OUT]       # what filled-in copies get right, what is wrong
    python test_pd.py grade FILE --hint NAME           # one exercise, and a hint
    python test_pd.py hunt N [FILE] [--answer]         # a copy of pd.py with a mistake, symptom, explanation
    python test_pd.py benchmark                        # the speed of training and sampling on this machine
    python test_pd.py seeds                            # the README's table: the digits with several seeds

A test's name and docstring are the property; its failure says where it does not hold. `pd` is pd.py, or the
file that the environment variable PD_FILE names. Equations and algorithms are those of arXiv:2202.00512.
"""
import argparse, ast, collections, contextlib, copy, faulthandler, functools, inspect, json, linecache, math
import os, re, shutil, socket, subprocess, sys, textwrap, time, traceback, types
from itertools import pairwise, product, zip_longest
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import pd as official

# ---- 1. Reference: the paper once more, in float64 and in log-SNR form, written without a look at pd.py ----
class ref:
    """α² = sigmoid(λ), σ² = sigmoid(-λ)."""
    def log_snr(t):
        """λ(t) = -2 log tan(a t + b): the cosine schedule, clipped to [-20, 20]."""
        b = math.atan(math.exp(-10))
        a = math.atan(math.exp(10)) - b
        return -2 * torch.log(torch.tan(a * torch.as_tensor(t, dtype=torch.float64) + b))
    def alpha_sigma(t):
        lam = ref.log_snr(t)
        return torch.sigmoid(lam).sqrt(), torch.sigmoid(-lam).sqrt()
    def at(z, t):
        """α_t, σ_t, λ_t, shaped to multiply z."""
        values = *ref.alpha_sigma(t), ref.log_snr(t)
        return [a.reshape(a.shape + (1,) * (z.ndim - 1)) if a.ndim else a for a in values]
    def noisy(x, eps, t):
        a, s, _ = ref.at(x, t)
        return a * x + s * eps
    def exact_output(x, eps, t, param):                         # what a perfect network says
        a, s, _ = ref.at(x, t)
        return {"v": a * eps - s * x, "eps": eps, "x": x, "both": torch.cat([x, eps], 1)}[param]
    def to_x_eps(out, z, t, param):
        out, z, (a, s, _) = out.double(), z.double(), ref.at(z, t)
        if param == "both":
            x_out, eps_out = out.chunk(2, 1)
            x = s**2 * x_out + a * (z - s * eps_out)
        else:
            x = {"v": a * z - s * out, "eps": (z - s * out) / a, "x": out}[param]
        return x, (z - a * x) / s
    def loss_weight(t, weighting):
        snr = torch.exp(ref.log_snr(t))
        return {"snr": snr, "truncated": snr.clamp(min=1), "snr+1": snr + 1, "constant": snr**0}[weighting]
    def weighted_loss(x_hat, x, t, weighting):
        return ref.loss_weight(t, weighting) * (x - x_hat).double().square().reshape(len(x), -1).mean(1)
    def ddim(x_hat, z, t, s):
        """Equation 8: z_s = e^((λ_t - λ_s)/2) (α_s/α_t) z_t + α_s (1 - e^((λ_t - λ_s)/2)) x̂."""
        (a_t, _, lam_t), (a_s, _, lam_s) = ref.at(z, t), ref.at(z, s)
        r = torch.exp((lam_t - lam_s) / 2)
        return r * (a_s / a_t) * z.double() + a_s * (1 - r) * x_hat.double()
    def ancestral(x_hat, z, t, s, noise_scale=1.0):
        """Mean and standard deviation of z_s, Equations 3 to 5, with r = e^(λ_t - λ_s)."""
        (a_t, s_t, lam_t), (a_s, s_s, lam_s) = ref.at(z, t), ref.at(z, s)
        r = torch.exp(lam_t - lam_s)
        lower, upper = torch.log((1 - r) * s_s**2), torch.log((1 - r) * s_t**2)
        std = torch.exp(((1 - noise_scale) * lower + noise_scale * upper) / 2)
        return r * (a_s / a_t) * z.double() + (1 - r) * a_s * x_hat.double(), std
    def walk(model, z, t, s, steps, sampler="ddim", clip=False):
        """z_s after so many steps of DDIM or Heun, whose last step is DDIM's."""
        def predict(z, t):
            x_hat = model(z, t)[0].double()
            return ref.to_x_eps(x_hat.clamp(-1, 1) if clip else x_hat, z, t, "x")
        times, z = [t + (s - t) * i / steps for i in range(steps)] + [s], z.double()
        for i, (start, end) in enumerate(pairwise(times), 1):
            x_hat, eps_hat = predict(z, start)
            z_end = ref.ddim(x_hat, z, start, end)
            if sampler == "heun" and i < steps:                 # the trapezoidal rule for dz = x̂ dα + ε̂ dσ
                x_end, eps_end = predict(z_end, end)
                da, ds, _ = (b - a for a, b in zip(ref.at(z, start), ref.at(z, end)))
                z_end = z + da * (x_hat + x_end) / 2 + ds * (eps_hat + eps_end) / 2
            z = z_end
        return z
    def distill_target(teacher, z, t, s, substeps=2):
        """Algorithm 2: x̃ = (z_s - (σ_s/σ_t) z_t) / (α_s - (σ_s/σ_t) α_t)."""
        (a_t, s_t, _), (a_s, s_s, _) = ref.at(z, t), ref.at(z, s)
        z_s = ref.walk(teacher, z, t, s, substeps)
        return (z_s - s_s / s_t * z.double()) / (a_s - s_s / s_t * a_t)
    def frechet_distance(a, b):
        """|μ_a - μ_b|² + tr(C_a + C_b - 2 (C_a C_b)^½), by scipy."""
        import scipy.linalg
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        cov_a, cov_b = np.cov(a.T), np.cov(b.T)
        root = scipy.linalg.sqrtm(cov_a @ cov_b).real
        return np.square(a.mean(0) - b.mean(0)).sum() + np.trace(cov_a + cov_b - 2 * root)

def says(x_of):
    """A denoiser (z, t) -> (x̂, ε̂) in z's type, made of a function x̂(z, α, σ)."""
    def model(z, t):
        a, s, _ = ref.at(z, t)
        x_hat = x_of(z, a, s)
        return x_hat.to(z.dtype), ((z - a * x_hat) / s).to(z.dtype)
    return model

def gaussian(mean, variance):
    """The exact denoiser of x ~ N(mean, variance): E[x | z] is linear in z."""
    return says(lambda z, a, s: mean + variance * a * (z - a * mean) / (variance * a**2 + s**2))

def always(value):
    """The exact denoiser of data that are all one value."""
    return says(lambda z, a, s: torch.full_like(z, value))

two_points = says(lambda z, a, s: torch.tanh(a * z / s**2))     # exact for x = ±1, each half the time

def recorded(model):
    """(a model that keeps what it is asked, the list of what it was asked)."""
    calls = []
    def recording(z, t):
        calls.append((z, t))
        return model(z, t)
    return recording, calls

# ---- 2. Graded tests: a student reads the docstring and the failure together ------------------------------
PARAMS, SAMPLERS = ("v", "eps", "x", "both"), ("ddim", "ancestral", "heun")
WEIGHTINGS = ("truncated", "snr+1", "snr", "constant")
INNER = (0.1, 0.25, 0.5, 0.75, 0.9)
TIMES = (*INNER, 0.0, 1 / 8192, 1 - 1 / 8192, 1.0)
SHAPES = ((3, 2, 4, 4), (3, 2), (3,))                           # pictures first, then points, then numbers
CLOCKS = (1.0, 0.5), (0.5, 0.25), (torch.tensor([1.0, 0.5, 0.2]), torch.tensor([0.5, 0.3, 0.0]))
EXERCISES = {                                                   # name: (what is to be written, the hint)
    "alpha_sigma": ("α_t and σ_t", "Which angle of the quarter circle belongs to log-SNR 20, which to -20?"),
    "log_snr": ("λ_t", "The log of a square is twice the log; the signal stands above, the noise below."),
    "v": ("x̂ and ε̂ from v", "(z, v) is (x, ε), turned by an angle: turn it back. At t = 0, z is x."),
    "eps": ("x̂ and ε̂ from ε", "z = α x + σ ε has one unknown left: solve for it."),
    "x": ("x̂ and ε̂ from x", "z = α x + σ ε has one unknown left: solve for it."),
    "both": ("x̂ and ε̂ from x̃ and ε̃", "x̂ is a mean of what the two say of x; σ² and α² add up to 1."),
    "loss_weight": ("the WEIGHTINGS, functions of the SNR, and w(λ_t)", "ε - ε̂ = -α/σ (x - x̂): square it."),
    "weighted_loss": ("the weighted x-error of each example", "One number each: what shape has the weight?"),
    "ddim_step": ("z_s from x̂ and ε̂", "z_s is made of signal and noise just as z_t is, at another time."),
    "ancestral_step": ("a draw from the posterior", "e^(λ_t - λ_s) is the square of α_t σ_s / (σ_t α_s)."),
    "sample": ("the sampler's loop", "Do N = 2 on paper: at which t is the model asked, to which s it goes."),
    "distill_target": ("x̃", "z_s = α_s x̃ + σ_s (z_t - α_t x̃) / σ_t is linear in x̃. And for s near t?"),
    "train": ("the lines of Algorithm 2, the student's t and its target", "Which t does its sampler visit?"),
    "outcome": ("nothing: your file at work", "All the above is at work here: first mend what is red above.")}
GRADED = {name: [] for name in EXERCISES}                       # name: its tests

def graded(*names):
    """A test that is one point for each of these exercises; it may take its exercise's name as `exercise`."""
    def register(test):
        for name in names:
            GRADED[name].append(test)
        return pytest.mark.parametrize("exercise", names, indirect=True)(test)
    return register

class Wrong(AssertionError):
    """Where a property fails."""

def check(condition, failure):
    if not condition:
        raise Wrong(failure)

def close(got, expected, what, rtol=1e-5, atol=0.0):
    """|got - expected| <= atol + rtol |expected| everywhere."""
    check(torch.is_tensor(got), f"{what} is {got}, which is no tensor: is a `return` missing?")
    expected = expected if torch.is_tensor(expected) else torch.full(got.shape, expected)
    check(got.shape == expected.shape, f"{what} has shape {tuple(got.shape)}, not {tuple(expected.shape)}")
    got, expected = got.detach().double().flatten(), expected.double().flatten()
    excess = (got - expected).abs() - atol - rtol * expected.abs()
    worst = excess.argmax()                                     # NaN is the largest of all
    check(excess[worst] <= 0, f"{what} is {got[worst]:.7g}, not {expected[worst]:.7g}")

def listing(values):
    values = [f"{float(v):.5g}" for v in values]
    return ", ".join(values[:8]) + ", ..." * (len(values) > 8)

def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

def example(t, *shape):
    """(x, ε, z_t)"""
    x, eps = normal(*shape, seed=1), normal(*shape, seed=2)
    return x, eps, ref.noisy(x, eps, t)

def output(param, *shape):                                      # of a network, twice the channels for "both"
    out = normal(*shape, seed=3)
    return torch.cat([out, out.flip(1) - 0.7], 1) if param == "both" else out

@graded("alpha_sigma")
def test_angle_of_alpha_sigma_is_linear_in_t(pd):
    """(α_t, σ_t) walks along the unit circle at constant speed, from log-SNR 20 at t = 0 to -20 at t = 1"""
    first = math.degrees(math.atan(math.exp(-10)))
    for t in (0.0, 1.0, *INNER):
        alpha, sigma = pd.alpha_sigma(t)
        close(alpha**2 + sigma**2, 1.0, f"α² + σ² at t = {t:g}")
        degrees = torch.atan2(sigma, alpha) * 180 / math.pi
        close(degrees, first + t * (90 - 2 * first), f"the angle in degrees at t = {t:g}")

@graded("alpha_sigma")
def test_alpha_sigma_keep_their_digits_in_float32(pd):
    """α_t and σ_t keep their digits in float32 where they are almost 0 (a cosine near π/2 does not)"""
    t = torch.tensor(TIMES)
    for name, got, expected in zip("ασ", pd.alpha_sigma(t), ref.alpha_sigma(t)):
        check(got.dtype == t.dtype, f"{name}_t is no float32 tensor")
        close(got, expected, f"{name}_t for the float32 t = 0, 0.1, 0.25, ..., 1")

@graded("log_snr")
def test_log_snr_runs_from_20_to_minus_20(pd):
    """λ_t = log(α_t²/σ_t²) is 20 at t = 0, 0 where α_t = σ_t, -20 at t = 1, and has the shape of t"""
    for t, expected in ((0.5, 0.0), (0.0, 20.0), (1.0, -20.0)):
        close(pd.log_snr(t), expected, f"λ_t at t = {t:g}", atol=1e-9)
    close(pd.log_snr(torch.tensor(TIMES)), ref.log_snr(torch.tensor(TIMES)), "λ_t in float32", atol=1e-6)

@graded(*PARAMS)
def test_exact_output_gives_back_x_and_eps(pd, exercise):
    """a network that is right gives back the x and ε that z_t = α_t x + σ_t ε was made of, x first"""
    for t in TIMES:
        x, eps, z = example(t, 2, 3, 4, 4)
        x_hat, eps_hat = pd.to_x_eps(ref.exact_output(x, eps, t, exercise), z, t, exercise)
        close(x_hat, x, f"x̂ at t = {t:g}")
        close(eps_hat, eps, f"ε̂ at t = {t:g}")

@graded(*PARAMS)
def test_x_hat_and_eps_hat_add_up_to_z_whatever_the_network_says(pd, exercise):
    """α_t x̂ + σ_t ε̂ = z and both are right for any output of the network, any shape, a t per example"""
    z, out = normal(2, 3), output(exercise, 2, 3)
    close(ref.noisy(*pd.to_x_eps(out, z, 0.3, exercise), 0.3), z, "the sum at t = 0.3")
    for shape in ((5, 2, 4, 4), (5, 2, 4), (5, 2)):
        z, out, t = normal(*shape), output(exercise, *shape), torch.tensor(INNER).double()
        x_hat, eps_hat = ref.to_x_eps(out, z, t, exercise)
        for name, got, expected in zip("xε", pd.to_x_eps(out, z, t, exercise), (x_hat, eps_hat)):
            close(got, expected, f"{name}̂ for z of shape {shape} and t = {listing(t)}")

@graded("loss_weight")
def test_loss_weights_make_the_eps_loss_and_the_v_loss(pd):
    """w ||x - x̂||² is ||ε - ε̂||² with "snr", ||v - v̂||² with "snr+1" and ||x - x̂||² with "constant" """
    for t, (weighting, param) in product(INNER, (("snr", "eps"), ("snr+1", "v"), ("constant", "x"))):
        (x, eps, z), x_hat = example(t, 1, 1), normal(1, 1, seed=3)
        _, eps_hat = ref.to_x_eps(x_hat, z, t, "x")
        loss = (ref.exact_output(x, eps, t, param) - ref.exact_output(x_hat, eps_hat, t, param))**2
        close(pd.loss_weight(t, weighting) * (x - x_hat)**2, loss, f"the {weighting!r} loss at t = {t:g}")

@graded("loss_weight")
def test_truncated_weight_is_at_least_1(pd):
    """w is max(SNR, 1) with "truncated": a one-step student works at t = 1, which counts; w is finite"""
    t = torch.tensor([1.0, 0.75, 0.25, 1 / 8192, 0.0])
    for weighting in WEIGHTINGS:
        got, expected = pd.loss_weight(t, weighting), ref.loss_weight(t, weighting)
        for i, clock in enumerate(t):
            close(got[i], expected[i], f"w with {weighting!r} at t = {clock:.5g}", 1e-4)

@graded("weighted_loss")
def test_weighted_loss_is_weight_times_mean_squared_x_error(pd):
    """the loss of a picture is w(λ_t) times the mean over its pixels of (x - x̂)²; ε̂ and the other pictures
    in the batch play no part. Points (B, 2) and single numbers (B,) have a loss, too"""
    t = torch.tensor([0.2, 0.5, 0.8]).double()
    for shape, weighting in product(SHAPES, WEIGHTINGS):
        x, eps, z = example(t, *shape)
        x_hat = torch.cat([x[:1], normal(*shape, seed=3)[1:]])
        got = pd.weighted_loss(lambda z, t: (x_hat, eps), x, z, t, weighting)
        close(got, ref.weighted_loss(x_hat, x, t, weighting),
              f"the {weighting!r} loss of three examples of shape {shape[1:]}, the first without error,")

@graded("ddim_step")
def test_ddim_step_is_equation_8(pd):
    """with the x and ε that z_t was made of, a step ends at the z_s that is made of the same x and ε; it is
    Equation 8's for any x̂ with ε̂ = (z_t - α_t x̂)/σ_t, for any shape, one s or one per example"""
    for s in TIMES:
        x, eps, z = example(s, 2, 3)
        close(pd.ddim_step(x, eps, s), z, f"z_s at s = {s:g}")
    for shape, (t, s) in product(SHAPES, CLOCKS):
        z, x_hat = normal(*shape), normal(*shape, seed=3)
        _, eps_hat = ref.to_x_eps(x_hat, z, t, "x")
        close(pd.ddim_step(x_hat, eps_hat, s), ref.ddim(x_hat, z, t, s),
              f"z_s of shape {shape} for t = {t}, s = {s}", atol=1e-6)

@graded("ancestral_step")
def test_ancestral_step_draws_from_the_posterior(pd):
    """the mean of z_s is that of q(z_s | z_t, x = x̂), Equation 3; the deviation is q(z_t | z_s)'s, with σ_t,
    if noise_scale is 1, the default, q(z_s | z_t, x̂)'s, with σ_s, if 0, and half way in logs if 0.5"""
    z, x_hat = torch.full((3, 100_000), 0.8), torch.full((3, 100_000), -0.5)
    for scale, (t, s) in product(((), (0.0,), (0.5,)), ((0.75, 0.5), *CLOCKS)):
        mean, std = ref.ancestral(x_hat, z, t, s, *scale)
        got = pd.ancestral_step(x_hat, z, t, s, *scale).double()
        where = f"for z_t = 0.8, x̂ = -0.5, t = {t}, s = {s}, noise_scale = {listing(scale) or 1}"
        close(got.mean(1), mean.mean(1), f"the mean {where}", 0.005, 0.02 * std.max().item())
        close(got.std(1), std.expand(3, 1).flatten(), f"the deviation {where}", 0.02)

@graded("sample")
def test_sample_with_ddim_and_heun_agrees_with_the_reference(pd):
    """N steps ask the model at t = 1, 1 - 1/N, ..., 1/N, and Heun at the end of each step but the last; with
    clip, x̂ is held within [-1, 1] at every prediction, and ε̂ fits the clipped x̂: α_t x̂ + σ_t ε̂ = z_t"""
    z = 2 * normal(2, 3)
    for clip, sampler, steps in product((False, True), ("ddim", "heun"), (1, 2, 5, 16)):
        (model, calls), (same, expected) = recorded(gaussian(0.3, 1.5)), recorded(gaussian(0.3, 1.5))
        x, where = pd.sample(model, z, steps, sampler, clip), f"with N = {steps}, {sampler}, clip = {clip}"
        right, times = ref.walk(same, z, 1.0, 0.0, steps, sampler, clip), listing(t for _, t in calls)
        check(times == listing(t for _, t in expected), f"{where} it is asked at {times or 'no time'}")
        close(x, right, f"{where} x")

@graded("sample")
def test_sample_ancestral_draws_all_steps_but_the_last(pd):
    """the ancestral sampler draws z_s, by default with the upper variance, but its last step is DDIM's"""
    x_hat = torch.full((1, 100_000), -0.5)
    for options, scale in (({}, 1.0), ({"noise_scale": 0.0}, 0.0)):
        model, calls = recorded(always(-0.5))
        x = pd.sample(model, 0 * x_hat + 0.8, 3, "ancestral", **options)
        for (z_t, t), (z_s, s) in pairwise(calls):
            mean, std = ref.ancestral(x_hat, z_t, t, s, scale)
            where = f"the noise of the step from t = {t:.3g} to s = {s:.3g}, noise_scale = {scale:g},"
            close(((z_s - mean) / std).mean(), 0.0, f"the mean of {where}", atol=0.02)
            close(((z_s - mean) / std).std(), 1.0, f"the deviation of {where}", 0.02)
        close(x, ref.ddim(x_hat, z_s, s, 0.0), f"x with noise_scale = {scale:g}", atol=1e-6)

@graded("distill_target")
def test_x_tilde_is_a_mean_of_what_the_teacher_predicts(pd):
    """x̃ lies between the teacher's predictions; if all are one value, it is that, within [-1, 1] or not"""
    for value, (t, s) in product((0.5, -3.0), ((0.75, 0.25), (1.0, 0.5), (1.0, 0.0), (0.25, 0.0))):
        got, where = pd.distill_target(always(value), normal(2, 1, 4, 4), t, s), f"t = {t:g}, s = {s:g}"
        check(not got.abs().max() > 1e6, f"x̃ is {got.abs().max():.3g} for {where}: what it is divided by is "
              "nearly 0; is a ratio in the denominator upside down?")
        close(got, value, f"x̃ for a teacher that always says {value:g}, {where}")

@graded("distill_target")
def test_teacher_is_asked_at_the_start_of_each_substep(pd):
    """the teacher is asked at the start of each of its steps, from t down, about z where its last step led"""
    for substeps in (2, 3):
        z, (model, calls) = normal(2, 3), recorded(two_points)
        pd.distill_target(model, z, 0.9, 0.3, substeps)
        times = listing(t for _, t in calls)
        check(times == listing(0.9 - 0.6 * i / substeps for i in range(substeps)),
              f"with t = 0.9, s = 0.3 and substeps = {substeps} it is asked at {times or 'no time'}")
        close(calls[1][0], ref.walk(two_points, z, 0.9, 0.9 - 0.6 / substeps, 1), "its second z")

@graded("distill_target")
def test_one_student_step_lands_where_the_teacher_lands(pd):
    """one DDIM step with x̃ from z_t ends where the teacher's steps end, within 1e-5 of the distance moved"""
    for substeps, steps in product((2, 3, 4, 8), (4, 1, 2, 16, 128)):
        t = torch.arange(1, steps + 1).double() / steps
        z, teacher, s = normal(steps, 4), gaussian(0.3, 0.4), t - 1 / steps
        landing, x_tilde = ref.walk(teacher, z, t, s, substeps), pd.distill_target(teacher, z, t, s, substeps)
        miss = ((ref.ddim(x_tilde, z, t, s) - landing).norm(dim=1) / (landing - z).norm(dim=1)).max()
        check(miss < 1e-5, f"with N = {steps} and substeps = {substeps} it misses by {miss:.3g} of it")

@graded("distill_target")
def test_x_tilde_agrees_with_algorithm_2(pd):
    """x̃ is Algorithm 2's for pictures, points and numbers, with one t and s or one for each example"""
    for shape, substeps, (t, s) in product(SHAPES, ([2], [], [1], [3]), CLOCKS):
        z, teacher = normal(*shape), gaussian(0.3, 0.4)
        close(pd.distill_target(teacher, z, t, s, *substeps), ref.distill_target(teacher, z, t, s, *substeps),
              f"x̃ of shape {shape} with substeps = {listing(substeps) or '2'}", atol=1e-6)

@graded("distill_target")
def test_x_tilde_keeps_its_digits_in_float32(pd):
    """x̃ keeps its digits in float32, also for a step so short that z_s is almost z_t"""
    z, t = normal(3, 1, 8, 8).float(), torch.tensor([1 / 8192, 0.5, 1.0])
    for step in (1 / 8192, 1 / 16384):
        exact = ref.distill_target(two_points, z, t, t - step)
        close(pd.distill_target(two_points, z, t, t - step), exact, "if all else holds, digits are lost in "
              "float32, where almost equal numbers are subtracted: x̃ for t = 1/8192, 0.5, 1 and "
              f"s = t - 1/{1 / step:g}", atol=1e-4)

class PointNet(nn.Sequential):                                  # net(z, t) for points in the plane
    def __init__(self):
        super().__init__(nn.Linear(6, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))
    def forward(self, z, t):
        angles = t[:, None] * torch.tensor([math.pi / 2, math.pi])
        return super().forward(torch.cat([z, angles.cos(), angles.sin()], 1))

def watch_training(pd, updates, **options):
    """Every (x_target, z, t) that `train` hands to `weighted_loss`, for data that are all 0.5."""
    def watched(model, x_target, z, t, weighting):
        seen.append([x_target.clone(), z.clone(), t.clone()])
        return model(z, t)[0].mean(1)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pd, "weighted_loss", watched)
        pd.train(pd.Denoiser(PointNet()), torch.full((8, 2), 0.5), updates, **options)
    return seen

@graded("train")
def test_student_trains_at_the_times_its_sampler_visits(pd):
    """a student of N steps trains at t = 1/N, 2/N, ..., 1, at all of them and at no others"""
    for steps in (1, 4):
        seen = watch_training(pd, 20, teacher=two_points, steps=steps, batch_size=32)
        times, clocks = torch.cat([t for _, _, t in seen]).unique(), torch.arange(1, steps + 1) / steps
        check(torch.equal(times, clocks), f"with N = {steps} its times are {listing(times)}")

@graded("train")
def test_student_target_is_x_tilde_of_its_own_step(pd):
    """a student learns from its teacher alone: its target is the x̃ of its own step, from t to t - 1/N"""
    for x_target, _, _ in watch_training(pd, 2, teacher=always(2.0), steps=4, batch_size=16):
        close(x_target, 2.0, "with a teacher that always says 2, the target for data that are all 0.5", 1e-4)
    for steps, substeps in ((4, 2), (4, 3), (1, 2)):
        teacher = gaussian(0.3, 0.4)
        seen = watch_training(pd, 3, teacher=teacher, steps=steps, substeps=substeps, batch_size=32)
        for x_target, z, t in seen:
            close(x_target, ref.distill_target(teacher, z, t, t - 1 / steps, substeps),
                  f"the target with N = {steps} and substeps = {substeps}", 1e-3, 1e-4)

@graded("train")
def test_student_and_teacher_see_z_made_of_data_and_noise(pd):
    """a student sees z = α_t x + σ_t ε of the data; a teacher has any t in (0, 1], and the data as target"""
    for who, options in (("student", {"teacher": two_points, "steps": 4}), ("teacher", {})):
        seen = watch_training(pd, 30, batch_size=128, **options)
        x_target, z, t = (torch.cat(column).double() for column in zip(*seen))
        a, s, _ = ref.at(z, t)
        eps = (z - 0.5 * a) / s
        close(eps.mean(), 0.0, f"the mean of (z - α_t x)/σ_t for a {who}", atol=0.06)
        close(eps.std(), 1.0, f"the deviation of (z - α_t x)/σ_t for a {who}", atol=0.06)
    close(x_target, 0.5, "the target of a teacher for data that are all 0.5")
    close(t.sort().values, torch.linspace(0, 1, len(t)), "a teacher's t, sorted,", atol=0.05)

@graded("outcome")
def test_one_step_student_draws_what_its_teacher_draws_in_eight(pd):
    """on a ring, one step of a student lands near eight of its teacher: four times nearer than one of them"""
    torch.manual_seed(0)
    angle, z, teacher = torch.rand(2000) * 2 * math.pi, normal(1000, 2).float(), pd.Denoiser(PointNet(), "v")
    data = torch.stack([angle.cos(), angle.sin()], 1)
    pd.train(teacher, data, 300, batch_size=256, lr=1e-2, ema=0.98)
    student = teacher
    for stage, steps in enumerate((4, 2, 1), 1):
        before, student = student, copy.deepcopy(student)
        pd.train(student, data, 100, teacher=before, steps=steps, batch_size=256, lr=3e-3, stage=stage)
    end = pd.sample(teacher, z, 8)
    off, allowed = ((pd.sample(model, z, 1) - end).norm() / end.norm() for model in (student, teacher))
    check(off < 0.25 * allowed, f"the student is off by {off:.3g} of it, the teacher by {allowed:.3g}")

# ---- 3. More mathematics: closed forms, the ends of time, devices and types --------------------------------
SOURCE = inspect.getsource(official)

def load(source, file="pd.py"):
    """A module made of the text of pd.py, which `import` knows nothing of."""
    module = types.ModuleType("pd")
    module.__file__ = str(file)
    exec(compile(source, str(file), "exec"), vars(module))
    return module

@pytest.fixture(scope="session")
def module():
    file = os.environ.get("PD_FILE", official.__file__)
    return load(Path(file).read_text(encoding="utf-8-sig"), file)

@pytest.fixture
def exercise(request):
    return getattr(request, "param", None)

@contextlib.contextmanager
def only(exercise, module):
    """The module, with all but this exercise taken from pd.py."""
    own = "to_x_eps" if exercise in PARAMS else exercise
    with pytest.MonkeyPatch.context() as patch:
        for name in ("to_x_eps", *EXERCISES):
            if exercise not in (None, "outcome") and name not in (*PARAMS, "train", "outcome", own):
                patch.setattr(module, name, getattr(official, name))
        yield module

@pytest.fixture
def pd(module, exercise):
    """The module under test; in a graded test only its exercise counts."""
    with only(exercise, module) as module:
        yield module

def everything(pd, z, param, t, s):
    """The results of all functions of parts 1 to 5 for one z."""
    def net(z, t):
        return 0.5 * (torch.cat([z, z], 1) if param == "both" else z)
    model, (x_hat, eps_hat) = pd.Denoiser(net, param), pd.to_x_eps(net(z, t), z, t, param)
    return [x_hat, eps_hat, *model(z, t), pd.ddim_step(x_hat, eps_hat, s),
            pd.ancestral_step(x_hat, z, t, s), pd.heun_step(model, x_hat, eps_hat, z, t, s),
            *(pd.weighted_loss(model, z, z, t, weighting) for weighting in WEIGHTINGS),
            pd.distill_target(model, z, t, s), *(pd.sample(model, z, 3, name, True) for name in SAMPLERS)]

@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize("param", PARAMS)
def test_results_have_the_type_and_the_device_of_z(pd, param):
    """Also on a pretended GPU, where to mix devices is an error. Targets and samples have no gradient."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    for dtype in (torch.float32, torch.float64):
        results = everything(pd, normal(2, 2).to(dtype).requires_grad_(), param, 0.3, 0.2)
        assert {got.dtype for got in results} == {dtype}
        assert [got.requires_grad for got in results] == 11 * [True] + 4 * [False]
    assert {(a.dtype, a.ndim) for a in (*pd.alpha_sigma(0.3), pd.log_snr(0.3))} == {(torch.float64, 0)}
    with FakeTensorMode():
        with torch.device("cuda:0"):
            z, clock = torch.empty(4, 1, 8, 8), torch.empty(4)
            data, net = z.byte(), pd.UNet(1, 8, attention=(2,), dropout=0.5)
        results = [*everything(pd, z, param, 0.5, 0.25), *everything(pd, z, param, clock, clock - 0.25),
                   net(z, clock), pd.draw(data, 4, flip=True)]
        assert {got.device.type for got in results} == {"cuda"}
        assert pd.features(net, data.cpu(), "cuda:0").device.type == "cpu"

def awake(net):
    for p in net.parameters():                                  # no last layer is zero, as after training
        nn.init.normal_(p, 0.0 if p.ndim > 1 else 0.5, 0.2)
    return net.eval()

def test_bfloat16_stays_inside_the_network(pd, monkeypatch):
    """As on a GPU the network computes in bfloat16; x̂, ε̂, loss, x̃ and samples are float32."""
    model, autocast, inside = pd.Denoiser(awake(pd.UNet(1, 8, attention=(2,))), "x"), torch.autocast, set()
    model.net.stem.register_forward_hook(lambda layer, inputs, out: inside.add(out.dtype))
    z, t = normal(4, 1, 8, 8).float(), torch.tensor([0.25, 0.5, 0.7, 0.75])
    def results():
        return [*model(z, t), pd.weighted_loss(model, z, z, t, "snr+1"), pd.sample(model, z, 2),
                pd.distill_target(model, z, t, t - 0.25), pd.sample(model, z, 2, "heun")]
    exact = results()
    monkeypatch.setattr(torch, "autocast", lambda device, dtype, enabled: autocast(device, dtype))
    for one, other in zip(exact[:3], results()):
        assert 0 < (one - other).norm() < 0.05 * one.norm()
    assert {result.dtype for result in results()} == {torch.float32}
    assert inside == {torch.float32, torch.bfloat16}

def test_denoiser_gives_the_network_a_clock_per_example(pd):
    """net(z, t) gets t as a (B,) tensor of z's type, whatever t is."""
    z = normal(2, 3).float()
    for t in (0.25, torch.tensor(0.25), torch.tensor([0.25, 0.5])):
        net, calls = recorded(lambda z, t: 0.3 * z)
        for got, expected in zip(pd.Denoiser(net, "x")(z, t), ref.to_x_eps(0.3 * z, z, t, "x")):
            close(got, expected, f"t = {t}")
        assert calls[0][1].dtype == z.dtype and torch.equal(calls[0][1], torch.as_tensor(t).expand(2))

def test_what_is_unknown_is_refused_with_what_would_be_right(pd):
    assert (pd.PARAMS, tuple(pd.WEIGHTINGS), pd.SAMPLERS) == (PARAMS, WEIGHTINGS, SAMPLERS)
    z, net = normal(2, 3), nn.Identity()
    assert pd.Denoiser(net).param == "v"
    for words, function, *args in (
            (PARAMS, pd.to_x_eps, z, z, 0.5, "w"), (PARAMS, pd.Denoiser, net, "w"),
            (WEIGHTINGS, pd.loss_weight, 0.5, "w"), (SAMPLERS, pd.sample, two_points, z, 2, "w"),
            ("01", pd.sample, two_points, z, 0), ("01", pd.distill_target, two_points, z, 1.0, 0.5, 0)):
        with pytest.raises(ValueError) as error:
            function(*args)
        assert all(str(word) in str(error.value) for word in (*words, args[-1]))

@pytest.mark.parametrize("param, weighting", list(product(PARAMS, WEIGHTINGS)))
def test_losses_of_every_param_and_weighting(pd, param, weighting):
    """In float32 1e-5 near away from the ends, and finite at the ends, where one-step students work."""
    t = torch.cat([torch.rand(64, generator=torch.Generator().manual_seed(0)), torch.tensor(TIMES)])
    (x, eps, z), inner = example(t, len(t), 2, 4), (t - 0.5).abs() <= 0.4
    out = ref.exact_output(x, eps, t, param) + output(param, len(t), 2, 4)
    expected = ref.weighted_loss(ref.to_x_eps(out, z, t, param)[0], x, t, weighting)
    model = pd.Denoiser(lambda z, t: out.to(z), param)
    close(pd.weighted_loss(model, x, z, t.double(), weighting), expected, "the loss in float64", 1e-5, 1e-12)
    loss = pd.weighted_loss(model, x.float(), z.float(), t, weighting)
    close(loss[inner], expected[inner], "the loss in float32")
    assert loss.dtype == torch.float32 and loss.isfinite().all()

@pytest.mark.parametrize("mean, variance", ((0.0, 1.0), (0.7, 0.1), (-2.0, 4.0)))
def test_gaussian_data_have_a_known_flow(pd, mean, variance):
    """(z - α mean) / sd(z) stays the same from t = 1 to 0. DDIM gets there at first order, Heun at second."""
    z, model = normal(50, 1), gaussian(mean, variance)
    (a1, s1), (a0, s0) = ref.alpha_sigma(1.0), ref.alpha_sigma(0.0)
    growth = ((a0**2 * variance + s0**2) / (a1**2 * variance + s1**2)).sqrt()
    exact = a0 * mean + (z - a1 * mean) * growth
    for sampler, order in (("ddim", 1), ("heun", 2)):
        coarse, fine = ((pd.sample(model, z, n, sampler) - exact).abs().max().item() for n in (128, 256))
        assert fine < 0.1 and abs(math.log2(coarse / fine) - order) < 0.25

def test_student_fitted_to_x_tilde_equals_the_two_step_teacher(pd):
    """For Gaussian data x̃ is linear in z, so least squares finds it: one step is two of the teacher."""
    def line(z):
        return torch.cat([z, torch.ones_like(z)], 1)
    teacher, z, fresh, t, s = gaussian(0.7, 0.3), normal(200, 1), normal(50, 1, seed=9), 0.5, 0.25
    weights = torch.linalg.lstsq(line(z), pd.distill_target(teacher, z, t, s)).solution
    x_hat, eps_hat = pd.to_x_eps(line(fresh) @ weights, fresh, t, "x")
    close(pd.ddim_step(x_hat, eps_hat, s), ref.walk(teacher, fresh, t, s, 2), "the landing", 1e-9, 1e-9)

def test_two_point_data_are_sampled_at_their_points(pd):
    """x = ±1: every sampler ends at one of them, DDIM at the sign of its noise."""
    z = normal(200, 1)
    for sampler in SAMPLERS:
        close(pd.sample(two_points, z, 64, sampler).abs(), 1.0, f"|x| of {sampler}", atol=1e-3)
    close(pd.sample(two_points, z, 64), z.sign(), "x of ddim", atol=1e-3)

# ---- 4. Classroom kit: hand it out, grade it, hunt the bug -------------------------------------------------
NAMES, SECONDS = list(EXERCISES)[:-1], 300      # what can be handed out; to grade one file, which takes ten
STARTS = {name: (f"def {name}(", f'if param == "{name}":') for name in NAMES}       # of what is taken out
STARTS |= {"train": ("t = torch.ceil(", "x = distill_target("), "loss_weight": ("def loss_w", "WEIGHTINGS =")}

def handout(names):
    """The text of pd.py with these exercises taken out."""
    lines, cuts = SOURCE.splitlines(), []
    statements = [node for node in ast.walk(ast.parse(SOURCE)) if isinstance(node, ast.stmt)]
    for name, node in product(set(names), statements):
        if lines[node.lineno - 1].strip().startswith(STARTS[name]):
            exercise = f"exercise {NAMES.index(name) + 1}: {EXERCISES[name][0]}"
            todo, block = f'raise NotImplementedError("{exercise}")', getattr(node, "body", [node])
            if isinstance(node, ast.FunctionDef):
                block = block[1:]                               # without the docstring
            elif name == "loss_weight":
                todo = f"WEIGHTINGS = dict.fromkeys({WEIGHTINGS})  # functions of the SNR"
            cuts.append((block[0].lineno - 1, block[-1].end_lineno, " " * block[0].col_offset + todo))
    for first, last, todo in sorted(cuts, reverse=True):
        lines[first:last] = [todo]
    return "\n".join(lines) + "\n"

def explain(test, error):
    """What a student reads: the property, and where it fails."""
    text = " ".join(str(error).split())[:500]
    if isinstance(error, NotImplementedError):
        return f"not filled in yet: {text}"
    if not isinstance(error, Wrong):
        text = f"it fails with {type(error).__name__}: {text}"
    return f"{' '.join(inspect.getdoc(test).split())}: {text}"

def failures(module, exercise):
    """{test: what is wrong} in one exercise, in this process."""
    found, arguments = {}, {"pd": module, "exercise": exercise}
    with only(exercise, module):
        for test in GRADED[exercise]:
            try:
                test(**{name: arguments[name] for name in inspect.signature(test).parameters})
            except Exception as error:
                found[test.__name__] = explain(test, error)
    return found

class Grading:
    """A pytest plugin that prints what is wrong in a test, at which lines of the file, and its prints."""
    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        if call.excinfo or call.when == "call":
            frames = traceback.extract_tb(call.excinfo and call.excinfo.tb)
            lines = [frame.lineno for frame in frames if frame.filename == os.environ["PD_FILE"]]
            failure = explain(item.function, call.excinfo.value) if call.excinfo else None
            print(json.dumps([failure, lines, report.capstdout[:2000]]), file=self.answers, flush=True)
        return report

def grade_here(seconds, *names):
    """Run graded tests in this process. When the time is up, it says on stderr where it is, and ends."""
    faulthandler.dump_traceback_later(float(seconds), exit=True)
    tests = [f"{__file__}::{test.__name__}[{name}]" for name in names for test in GRADED[name]]
    options = "--capture=sys -p no:faulthandler -p no:cacheprovider -p no:terminal".split()
    Grading.answers = os.fdopen(os.dup(1), "w")                 # the file may print what it likes: to stderr
    os.dup2(2, 1)
    pytest.main(tests + options, [Grading()])

def grade(file, names):
    """[{"exercise", "test", "failure", "printed"}]: the graded tests of a file, run in a process."""
    path, rows = Path(file).resolve(), []
    env = os.environ | {"PD_FILE": str(path), "OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import test_pd; test_pd.grade_here(*sys.argv[1:])"
    line = [sys.executable, "-c", code, str(SECONDS), *names]
    done = subprocess.run(line, capture_output=True, text=True, env=env)
    lost = ("no answer: the program ended, by an exit or a crash", [], "")
    if "Timeout (" in done.stderr:                              # the stack follows, its last call first
        lines = re.findall(rf'[/\\]{re.escape(ascii(path.name)[1:-1])}", line (\d+)', done.stderr)
        lost = ("it still runs when the time is up: an endless loop?", lines[::-1], "")
    tests = [(name, test.__name__) for name in names for test in GRADED[name]]
    answers = zip_longest(tests, map(json.loads, done.stdout.splitlines()), fillvalue=lost)
    for (name, test), (failure, lines, printed) in answers:
        if lines and not failure.startswith("not filled in"):
            line = linecache.getline(str(path), int(lines[-1])).strip()
            failure += f" (last line of yours: {lines[-1]}: {line})"
        rows.append({"exercise": name, "test": test, "failure": failure, "printed": printed})
    return rows

def grade_files(args):
    results = []
    for file in args.files:
        open(file, "rb").close()                                # an error here, before any is graded
    if args.json:
        write_new(args.json, "")
    for file in args.files:
        rows = grade(file, [args.hint] if args.hint else list(EXERCISES))
        points = sum(not row["failure"] for row in rows)
        results.append({"file": file, "points": points, "of": len(rows), "tests": rows})
        if args.json:
            Path(args.json).write_text(json.dumps(results, indent=1, ensure_ascii=False), encoding="utf8")
        print(file)
        for name in dict.fromkeys(row["exercise"] for row in rows):
            mine = [row for row in rows if row["exercise"] == name]
            wrong = [row["failure"] for row in mine if row["failure"]]
            print(f"    {name:16}{len(mine) - len(wrong)}/{len(mine)}")
            for failure in dict.fromkeys(wrong):
                print(textwrap.fill(failure, 110, initial_indent="      - ", subsequent_indent="        "))
            for line in "".join(row["printed"] for row in mine).splitlines()[:20]:
                print(f"      prints: {line}")
        print(f"    {'points':16}{points}/{len(rows)}", flush=True)
    if args.hint:
        print(f"hint: {EXERCISES[args.hint][1]}")

# `old` in pd.py becomes `new`; the exercise fails with `clue`. With a measured symptom it is for the hunt.
Mistake = collections.namedtuple("Mistake", "exercise old new clue symptom answer", defaults=("", ""))
ALPHA, ALPHA_T = "torch.sin(FIRST_ANGLE + span * (1 - t))", "torch.cos(FIRST_ANGLE + span * t)"
ALPHAS, LOG_SNR = ALPHA + ", torch.sin(FIRST_ANGLE + span * t)", "2 * torch.log(alpha / sigma)"
V, EPS = "alpha * z - sigma * out, sigma * z + alpha * out", "(z - sigma * out) / alpha, out"
X, DDIM = "out, (z - alpha * out) / sigma", "alpha * x_hat + sigma * eps_hat"
SNR, MEAN = "(torch.exp(log_snr(t)))", ".reshape(len(z), -1).mean(1)"
STD = "sigma_s**(1 - noise_scale) * sigma_t**noise_scale"
CLIP = 'to_x_eps(x_hat.clamp(-1, 1), z, t, "x") if clip else (x_hat, eps_hat)'
ASK, CLAMP = "        x_hat, eps_hat = teacher(z, start)\n", "        x_hat = x_hat.clamp(-1, 1)\n"
CLOCK, ZEROS = "torch.ceil(t * steps) / steps", "    x_tilde = torch.zeros_like(z)\n"
QUOTIENT = """    first = z                                   # Algorithm 2 as the paper prints it
    for i in range(substeps):
        z = ddim_step(*teacher(z, t + (s - t) * i / substeps), t + (s - t) * (i + 1) / substeps)
    (a_t, s_t), (a_s, s_s) = alpha_sigma_for(z, t), alpha_sigma_for(z, s)
    return (z - s_s / s_t * first) / (a_s - s_s / s_t * a_t)
"""
MISTAKES = [
    Mistake("distill_target", "x_tilde / (alpha_over_sigma(s) - alpha_over_sigma(t))", "x_hat", "misses by",
            "Losses look fine; students of 4 and 2 steps are off by 0.028 and 0.059, not 0.006 and 0.020.",
            "The teacher's second prediction is taken for x̃; a DDIM step with it misses the landing."),
    Mistake("distill_target", "(t * (substeps - i) + s * i)", "(t * i + s * (substeps - i))", "asked at 0.3",
            "Students are far worse than their teacher in as few steps: off by 0.67 (4 steps), not 0.006.",
            "The teacher's times are exchanged: it walks from s up to t, not from t over t' down to t''."),
    Mistake("loss_weight", "snr.clamp(min=1)", "snr.clamp(min=0)", "at t = 1 is 2.061154e-09, not 1",
            "The loss of a one-step student falls to 6e-10, yet it is off by 0.61, not 0.05.",
            "The weight is not truncated: it is the SNR, e^-20 at t = 1, where a one-step student works."),
    Mistake("distill_target", ASK, ASK + CLAMP, "within [-1, 1] or not",
            "The loss of a student of 4 steps is 2e-3, not 6e-5, and it is off by 0.034, not 0.006.",
            "The teacher is clipped inside the target, a path it does not take. x̃ may lie outside [-1, 1]."),
    Mistake("train", CLOCK, "torch.floor(t * steps) / steps", "with N = 1 its times are 0",
            "The student of 4 steps is off by 0.012, not 0.006, and the one of 1 step by 0.39, not 0.05.",
            "The clock is off by one: 0, ..., 1 - 1/N. It never sees t = 1, where its sampler starts."),
    Mistake("train", "x = distill_target(", "_ = distill_target(", "all 0.5 is 0.5, not 2",
            "Students' losses stay at 0.5, and in one step they are as bad as the teacher: 0.63 and 0.64.",
            "x̃ is computed and not used: the student learns the data, whose mean given z is a blur."),
    Mistake("alpha_sigma", ALPHAS, "(t * math.pi / 2).cos(), (t * math.pi / 2).sin()", "is 0, not 0.0026"),
    Mistake("alpha_sigma", ALPHAS, "torch.sin(FIRST_ANGLE + span * t), " + ALPHA, "at t = 0 is 89.9"),
    Mistake("alpha_sigma", ALPHA, ALPHA_T, "keep their digits in float32"),
    Mistake("log_snr", LOG_SNR, "torch.log(alpha / sigma)", "λ_t at t = 0 is 10, not 20"),
    Mistake("log_snr", LOG_SNR, "2 * torch.log(sigma / alpha)", "λ_t at t = 0 is -20, not 20"),
    Mistake("log_snr", LOG_SNR, "(alpha / sigma)**2", "λ_t at t = 0.5 is 1, not 0"),
    Mistake("v", V, "sigma * z - alpha * out, alpha * z + sigma * out", "gives back the x and ε"),
    Mistake("v", V, "alpha * z + sigma * out, sigma * z - alpha * out", "gives back the x and ε"),
    Mistake("v", V, "sigma * z + alpha * out, alpha * z - sigma * out", "x first"),
    Mistake("eps", EPS, "z - sigma * out, out", "α_t x̂ + σ_t ε̂ = z"),
    Mistake("eps", EPS, "(z - out) / alpha, out", "α_t x̂ + σ_t ε̂ = z"),
    Mistake("eps", EPS, "out, (z - sigma * out) / alpha", "x first"),
    Mistake("x", X, "out, z - alpha * out", "α_t x̂ + σ_t ε̂ = z"),
    Mistake("x", X, "out, (z - out) / sigma", "α_t x̂ + σ_t ε̂ = z"),
    Mistake("x", X, "(z - alpha * out) / sigma, out", "x first"),
    Mistake("both", "x_out, eps_out = out", "eps_out, x_out = out", "x first"),
    Mistake("both", "x_hat = sigma**2 * x_out", "x_hat = sigma * x_out", "x̂ at t = 0.1"),
    Mistake("both", "alpha**2 * eps_out + sigma * (z - alpha * x_out)", "eps_out", "α_t x̂ + σ_t ε̂ = z"),
    Mistake("loss_weight", SNR, "((1 - torch.as_tensor(t)) / t)", "loss at t = 0.1"),
    Mistake("loss_weight", SNR, "(log_snr(t))", '||ε - ε̂||² with "snr"'),
    Mistake("weighted_loss", MEAN, ".reshape(len(z), -1).sum(1)", "the mean over its pixels"),
    Mistake("weighted_loss", MEAN, ".mean()", "the other pictures in the batch"),
    Mistake("weighted_loss", MEAN, ".mean((1, 2, 3))", "Points (B, 2) and single numbers"),
    Mistake("ddim_step", DDIM, "sigma * x_hat + alpha * eps_hat", "made of the same x and ε"),
    Mistake("ddim_step", DDIM, "alpha * x_hat + sigma * torch.randn_like(x_hat)", "made of the same x and ε"),
    Mistake("ddim_step", DDIM, "alpha * x_hat + (1 - alpha) * eps_hat", "z_s at s = 0.1"),
    Mistake("ancestral_step", STD, "sigma_t**(1 - noise_scale) * sigma_s**noise_scale", "deviation for z_t"),
    Mistake("ancestral_step", "(1 - ratio).sqrt()", "(1 - ratio)", "the deviation for z_t"),
    Mistake("ancestral_step", STD, "(sigma_s + noise_scale * (sigma_t - sigma_s))", "noise_scale = 0.5"),
    Mistake("sample", CLIP, "(x_hat.clamp(-1, 1) if clip else x_hat), eps_hat", "ε̂ fits the clipped x̂"),
    Mistake("sample", '"ddim" or s == 0', '"ddim"', "Heun at the end of each step but the last"),
    Mistake("sample", "for i in range(steps, 0, -1):", "for i in range(steps, 1, -1):", "at no time"),
    Mistake("distill_target", ZEROS, QUOTIENT, "digits are lost in float32"),
    Mistake("distill_target", ZEROS, QUOTIENT.replace("s_s / s_t", "s_t / s_s"), "is nearly 0; is a ratio"),
    Mistake("train", "z, t, t - 1 / steps,", "z, t, t - 0.5 / steps,", "from t to t - 1/N")]
HUNTS = [mistake for mistake in MISTAKES if mistake.symptom]

def plant(mistake):
    assert SOURCE.count(mistake.old) == 1, f"{SOURCE.count(mistake.old)} times in pd.py: {mistake.old}"
    return SOURCE.replace(mistake.old, mistake.new)

def hunt(args):
    mistake = HUNTS[args.number - 1]
    if args.file:
        write_new(args.file, plant(mistake))
    print(f"Mistake {args.number}, on points of a ring, with a teacher of 8 steps: {mistake.symptom}")
    if args.answer:
        line = SOURCE[:SOURCE.index(mistake.old)].count("\n") + 1
        print(f"{mistake.answer}\nLine {line}:\n- {mistake.old.strip()}\n+ {mistake.new.strip()}")

def write_new(file, text):
    with open(file, "x", encoding="utf8") as out:               # never over somebody's work
        out.write(text)

# ---- 5. Tests of the kit -----------------------------------------------------------------------------------
@pytest.mark.parametrize("mistake", MISTAKES, ids=[f"{m.exercise}-{n}" for n, m in enumerate(MISTAKES, 1)])
def test_every_mistake_is_caught_with_a_message_that_leads_to_it(mistake):
    assert mistake.clue in str(failures(load(plant(mistake)), mistake.exercise))

def test_one_solution_turns_one_exercise_green():
    for solved in [None, *NAMES]:                               # None: a blank handout scores 0
        module = load(handout([name for name in NAMES if name != solved]))
        for number, name in enumerate(NAMES, 1):
            todo = f"not filled in yet: exercise {number}: {EXERCISES[name][0]}"
            assert failures(module, name) == {test.__name__: todo for test in GRADED[name] if name != solved}
    assert handout(["train"]).count("NotImplementedError") == 2
    assert min(sum(mistake.exercise == name for mistake in MISTAKES) for name in NAMES) >= 3

def test_grade_says_where_a_file_goes_wrong(tmp_path, capsys, monkeypatch):
    """Prints, a crash and what is not filled in; then two files that get stuck after their first point."""
    mine, loop, end, out = (str(tmp_path / name) for name in ("mine.py", "löop.py", "end.py", "out.json"))
    first, line = "    return [a.reshape(", "return alpha * x_hat + sigma * eps_hat"
    write_new(mine, handout(["log_snr"]).replace(line, f"print('here'); {line}[nonsense]"))
    write_new(loop, SOURCE.replace(first, f"    while torch.is_tensor(t): pass\n{first}"))
    write_new(end, SOURCE.replace(first, f"    if torch.is_tensor(t): os._exit(0)\n{first}"))
    main(["grade", mine])
    printed = " ".join(capsys.readouterr().out.split())
    assert "not filled in yet: exercise 2: λ_t" in printed and "prints: here" in printed
    assert re.search(r"'nonsense' is not defined \(last line of yours: \d+: print\(.here.\)", printed)
    points = re.findall(r"(\w+) (\d+)/(\d+)(?: |$)", printed)
    assert [name for name, got, of in points if got != of] == ["log_snr", "ddim_step", "outcome", "points"]
    assert int(points[-1][2]) == sum(map(len, GRADED.values()))
    monkeypatch.setattr(sys.modules[main.__module__], "SECONDS", 12)
    main(["grade", loop, end, "--hint", "x", "--json", out])
    results = json.loads(Path(out).read_text(encoding="utf8"))
    (good, stuck), (fine, ended) = ([row["failure"] for row in result["tests"]] for result in results)
    assert good is fine is None and "by an exit or a crash" in ended
    assert re.search(r"an endless loop\? \(last line of yours: \d+: while torch.is_tensor\(t\): pass", stuck)
    assert EXERCISES["x"][1] in capsys.readouterr().out

def test_commands_write_what_they_say_and_never_over_a_file(tmp_path, capsys):
    """Without the notebook, modules of Unix or scipy, too; nonsense is refused."""
    handed, hunted, none = (str(tmp_path / name) for name in "abc")
    shutil.copy(official.__file__, tmp_path)
    shutil.copy(__file__, tmp_path)
    missing = "import sys; sys.modules.update(resource=None, fcntl=None, scipy=None); import test_pd; "
    job = [sys.executable, "-c", f"{missing}test_pd.main(['handout', 'a'])"]
    subprocess.run(job, cwd=tmp_path, check=True, timeout=300)
    assert Path(handed).read_text(encoding="utf8") == handout(NAMES)
    main(["hunt", "3", hunted])
    assert HUNTS[2].answer not in capsys.readouterr().out
    main(["hunt", "3", "--answer"])
    assert HUNTS[2].answer in capsys.readouterr().out
    for bad in (f"handout {handed}", f"hunt 9 {handed}", f"grade {handed} {none}", f"handout {none} --only y",
                f"grade {handed} --json {hunted}", "hunt 99", f"hunt 1 {none} --x", "seeds x"):
        with pytest.raises(SystemExit, match="2"):
            main(bad.split())
    assert Path(hunted).read_text(encoding="utf8") == plant(HUNTS[2]) and not Path(none).exists()

# ---- 6. Network, data, evaluation --------------------------------------------------------------------------
@pytest.mark.parametrize("channels, H, W, mults, patch", [
    (1, 8, 8, (1, 2), 1), (3, 28, 28, (1, 2, 2), 2), (1, 25, 25, (1, 2, 2), 1), (2, 7, 10, (1,), 4)])
def test_unet_takes_any_channels_any_size_and_any_patch(pd, channels, H, W, mults, patch):
    """t matters, neighbours in the batch do not; patches make it the network without, on space to depth."""
    def depth(z):
        squares = [z[..., i::patch, j::patch] for i, j in product(range(patch), range(patch))]
        return torch.stack(squares, 2).flatten(1, 2)
    same = functools.partial(torch.allclose, atol=1e-4, rtol=1e-4)
    net = pd.UNet(channels, 8, mults, attention=(1, 2), patch=patch, outputs=2)
    plain = pd.UNet(channels * patch**2, 8, mults, attention=(1, 2), outputs=2).eval()
    z, t, multiple = torch.randn(3, channels, H, W), torch.tensor([0.1, 0.5, 0.9]), patch << len(mults) - 1
    padded = nn.functional.pad(z, (0, -W % multiple, 0, -H % multiple))
    angles = 1000 * t[:, None] * 10000.0 ** (-torch.arange(4) / 4)
    assert same(pd.time_embedding(t, 8), torch.cat([angles.cos(), angles.sin()], 1))
    assert net(z, t).abs().max() == 0
    plain.load_state_dict(awake(net).state_dict())
    with torch.no_grad():
        out, whole = net(z, t), net(padded, t)
        assert out.shape == (3, 2 * channels, H, W) and same(out, whole[..., :H, :W])
        assert same(depth(whole), plain(depth(padded), t)) and same(out[1:2], net(z[1:2], t[1:2]))
        assert not torch.allclose(out[:1], net(z[:1], t[1:2]), atol=1e-3)
        net.middle2.forward = lambda h, emb: 0 * h              # what is left goes through skip connections
        assert not torch.allclose(net(z, t), net(0 * z, t), atol=1e-3)

def test_presets_are_networks_of_their_size_and_the_papers_numbers(pd, monkeypatch):
    """And fit the pictures; ε's weighting does not diverge (Table 1); processes share a batch evenly."""
    for shape, device, preset, millions in (
            ((1, 16, 16), "cuda", "digits", 0.7), ((1, 32, 28), "cpu", "grey-cpu", 1.1),
            ((3, 17, 16), "cpu", "large-cpu", 2.6), ((1, 33, 32), "cuda", "large", 39)):
        config = pd.configure(pd.parse_args([]), torch.zeros(9, *shape), torch.device(device))
        assert vars(config).items() >= pd.PRESETS[preset].items()
        assert numbers(pd.build(config, "cpu")).numel() == pytest.approx(1e6 * millions, rel=0.1)
    facts = dict(width=256, mults=(1, 1, 1), blocks=3, dropout=0.2, param="x", weighting="truncated", lr=2e-4,
                 ema=0.9999, warmup=1000, batch_size=128, student_lr=5e-5, student_updates=50_000, stages=13,
                 substeps=2, final_steps=1, patch=1, flip=True, early_share=1)
    assert vars(pd.Config(**pd.PRESETS["paper"])).items() >= facts.items()
    assert (pd.Config(param="eps").weighting, pd.Config(param="x").weighting) == ("snr", "truncated")
    monkeypatch.setattr(pd, "WORLD", 3)
    with pytest.raises(ValueError, match="--batch-size must be a multiple of the 3"):
        pd.configure(pd.parse_args([]), torch.zeros(9, 1, 8, 8), torch.device("cpu"))

def save_pictures(folder, arrays, suffix="png"):
    folder.mkdir(parents=True)
    for i, array in enumerate(arrays):
        Image.fromarray(np.asarray(array, np.uint8)).save(folder / f"{i:02}.{suffix}")

def test_folder_flat_or_a_subfolder_a_class_grey_or_colour_resized_or_not(pd, tmp_path):
    """Every pixel arrives; one picture in colour makes all RGB; a size takes the centre."""
    rng, wide = np.random.default_rng(0), np.pad(np.full((8, 8), 200), ((0, 0), (4, 4)))
    grey, colour = rng.integers(0, 256, (3, 6, 9)), rng.integers(0, 256, (2, 6, 9, 3))
    for name, arrays in {"flat": grey, "all/a": grey, "all/b": colour, "wide": [wide, wide.T]}.items():
        save_pictures(tmp_path / name, arrays)
    images, labels = pd.load_dataset(str(tmp_path / "flat"))
    assert images.shape == (3, 1, 6, 9) and (images[:, 0].numpy() == grey).all() and not labels.any()
    images, labels = pd.load_dataset(str(tmp_path / "all"))
    assert images.shape == (5, 3, 6, 9) and labels.tolist() == [0, 0, 0, 1, 1]
    assert (images[3:].permute(0, 2, 3, 1).numpy() == colour).all() and (images[0].numpy() == grey[0]).all()
    images, _ = pd.load_dataset(str(tmp_path / "wide"), size=4)
    assert images.shape == (2, 1, 4, 4) and images[..., 1:-1].float().mean() > 190

def test_digits_need_no_torchvision_and_mnist_and_cifar10_come_from_it(pd, monkeypatch):
    """The digits rounded from 17 levels; the others here from pictures that torchvision makes up."""
    from sklearn.datasets import load_digits
    datasets, digits = pytest.importorskip("torchvision").datasets, load_digits()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torchvision", None)
        images, labels = pd.load_dataset("digits")
    assert images.dtype == torch.uint8 and labels.tolist() == digits.target.tolist()
    assert np.abs(images[:, 0].numpy() / 255 - digits.images / 16).max() < 0.5 / 255 + 1e-9
    for kind, shape in ("MNIST", (1, 28, 28)), ("FashionMNIST", (1, 28, 28)), ("CIFAR10", (3, 32, 32)):
        made_up, name = datasets.FakeData(3, shape), kind.lower().replace("fashion", "fashion-")
        monkeypatch.setattr(datasets, kind, lambda root, download: made_up if download else root)
        for image, label, (picture, right) in zip(*pd.load_dataset(name), made_up, strict=True):
            assert (image.permute(1, 2, 0).squeeze().numpy() == np.asarray(picture)).all() and label == right

def test_pictures_become_numbers_from_minus_1_to_1(pd):
    """Black is -1, white is 1; and back. All pictures are drawn, where asked for half of them mirrored."""
    data = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    close(pd.draw(data, 2, flip=False)[0].flatten(), torch.linspace(-1, 1, 256), "the pixels", atol=1e-6)
    for value, pixel in ((-7.0, 0), (-1.0, 0), (0.002, 128), (1.0, 255), (7.0, 255)):
        assert (pd.generate(always(value), 2, (1, 2, 2), 1) == pixel).all(), value
    rows = data.reshape(16, 1, 1, 16)
    both = torch.cat([rows, rows.flip(-1)]).float() / 127.5 - 1
    for flip, kinds in ((True, 32), (False, 16)):
        found = (pd.draw(rows, 1600, flip)[:, None] == both).flatten(2).all(2).sum(0)
        assert found.sum() == 1600 and found.count_nonzero() == kinds and found.max() < 2.5 * 1600 / kinds

def test_frechet_distance_of_gaussians_has_its_closed_form(pd):
    """As scipy has it; a shift by 2 in 3 dimensions is 12; 3 a against a is (3 - 1)² tr C; flat data work."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(500, 3)) @ rng.normal(size=(3, 3)), rng.normal(size=(400, 3)) + [1, 2, 3]
    a -= a.mean(0)
    flat, tr = np.hstack([a, np.zeros((500, 2))]), np.trace(np.cov(a.T))
    for x, y, d in ((a, a + 2, 12), (3 * a, a, 4 * tr), (flat, flat, 0), (a, b, ref.frechet_distance(a, b))):
        assert pd.frechet_distance(x, y) == pytest.approx(d, rel=1e-9, abs=1e-9)

def test_generate_gives_every_model_the_same_noise_and_the_same_first_pictures(pd, monkeypatch):
    """Normal noise, other noise in every chunk and for another seed; sampler and clip reach `sample`."""
    monkeypatch.setattr(pd, "CHUNK", 4)
    (model, seen), shape = recorded(says(lambda z, a, s: 3 * z)), (1, 2, 2)
    three = pd.generate(model, 3, shape, 2, "heun", 5)
    other, ten = (pd.generate(model, 10, shape, 2, "heun", seed, clip=True) for seed in (6, 5))
    noise = torch.cat([z for z, t in seen if t == 1])[-10:]
    assert len(noise.unique()) == 40 and abs(noise.mean()) < 0.5 and 0.6 < noise.std() < 1.4
    assert (three == pixels(pd.sample(model, noise[:3], 2, "heun"))).all() and three.dtype == torch.uint8
    assert (ten == pixels(pd.sample(model, noise, 2, "heun", True))).all() and (other != ten).any()

# ---- 7. Training, watched at Adam, and the ladder, a real run, watched at `train` -------------------------
def numbers(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])

def pixels(x):
    return ((x.clamp(-1, 1) + 1) * 127.5).round()

def test_training_clips_gradients_averages_weights_and_logs_means(pd):
    """Adam has the schedule's rate, norms of 1 at most; a teacher ends as its average, a student as it is."""
    from torch.optim.optimizer import register_optimizer_step_post_hook
    def train(**options):
        def after_step(optimizer, args, kwargs):
            gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
            updates.append((optimizer.param_groups[0]["lr"], gradient.norm().item(), numbers(model)))
        torch.manual_seed(0)
        model, updates = pd.Denoiser(PointNet()), []
        start, options = numbers(model), dict(lr=0.01, warmup=4, decay=0.5, ema=0.8, batch_size=8) | options
        with register_optimizer_step_post_hook(after_step):
            log = pd.train(model, 30 * normal(64, 2).float(), 61, **options)
        return log, start, numbers(model), updates              # an update: rate, norm, new weights
    for teacher in (None, always(2.0)):
        log, end, got, updates = train(teacher=teacher, steps=4, every=1)
        for n, (rate, norm, weights) in enumerate(updates):
            memory = 0 if teacher else min(0.8, (n + 1) / (n + 10))             # short at first
            end, right = memory * end + (1 - memory) * weights, 0.01 * (1 - n / 61)
            if not teacher:
                right = min(0.01 * (n + 1) / 4, 0.01, right / 0.5)
            assert rate == log[n]["lr"] == pytest.approx(right) and norm < 1 + 1e-4
        close(got, end, "a weight", atol=1e-6)
        assert log[0]["grad_norm"] > 2 and [row["update"] for row in log] == list(range(1, 62))
        pairs, (rows, *_) = [*zip(log[::2], log[1::2]), log[60:]], train(teacher=teacher, steps=4, every=2)
        for row, pair in zip(rows, pairs, strict=True):
            means = {key: np.mean([r[key] for r in pair]) for key in ("loss", "grad_norm")}
            assert row == pytest.approx(pair[-1] | means, rel=1e-4)
    others = {}, {"seed": 1}, {"stage": 1}, {"batch_size": 16}, {"weighting": "constant"}
    assert len({train(**options)[0][0]["loss"] for options in others}) == len(others)

def test_dropout_acts_for_the_teacher_and_not_for_students(pd):
    """Only a teacher in training says something else each time; a model that gives targets never does."""
    def asked(model, inputs, answer):
        differs.append(bool((model.forward(*inputs)[0] != answer[0]).any()))
    data, differs = torch.zeros(8, 1, 4, 4), []
    teacher, student = [pd.Denoiser(awake(pd.UNet(1, 8, dropout=0.5))) for _ in range(2)]
    teacher.register_forward_hook(asked)
    student.register_forward_hook(asked)
    pd.train(teacher, data, 2, batch_size=4)
    student.train()                                             # as if somebody had left it so
    pd.train(student, data, 2, batch_size=4, teacher=teacher, steps=2)
    assert differs == 2 * [True] + 6 * [False] and not (teacher.training or student.training)

def command(pd, *args):
    try:                                                        # the exit status, in this process
        pd.main([str(arg) for arg in args])
        return 0
    except (SystemExit, KeyboardInterrupt) as stop:
        return getattr(stop, "code", None)

TINY = ("--preset digits --width 8 --teacher-updates 12 --student-updates 6 --stages 2 --batch-size 8 "
        "--eval-samples 30 --device cpu --no-compile").split()

@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "pictures"
    save_pictures(folder, np.random.default_rng(0).integers(0, 256, (24, 8, 6)))
    return folder

@pytest.fixture(scope="session")
def ladder(module, pictures, tmp_path_factory):
    """A run; .stages: the calls of `train`, .models: the contents of its files, of 4 steps, 2 and 1."""
    def train(model, data, updates, **options):
        start, teacher = numbers(model), options["teacher"] and numbers(options["teacher"])
        log = real_train(model, data, updates, **options)
        options |= {"updates": updates, "start": start, "teacher": teacher, "log": log, "end": numbers(model)}
        stages.append(types.SimpleNamespace(data=data, **options))
        return log
    out, stages, real_train = tmp_path_factory.mktemp("runs") / "ladder", [], module.train
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "train", train)
        assert command(module, *TINY, "--dataset", pictures, "--out", out) == 0
    files = (4, "teacher.pt"), (2, "student-2.pt"), (1, "student-1.pt")
    models = {steps: module.load_model(out / file) for steps, file in files}
    return types.SimpleNamespace(out=out, stages=stages, models=models)

def test_a_student_starts_as_a_copy_of_its_teacher_the_model_before(ladder):
    """Bit for bit; its targets come from that same model; those of 2 and 1 steps get twice the updates. Files
    hold the weights, name, steps, updates and log, which is also log.csv, and nothing half trained."""
    facts = [(stage.stage, stage.steps, stage.updates, len(stage.data)) for stage in ladder.stages]
    assert facts == [(0, 4, 12, 24), (1, 2, 12, 24), (2, 1, 12, 24)] and ladder.stages[0].teacher is None
    for before, stage in pairwise(ladder.stages):
        assert torch.equal(stage.start, before.end) and torch.equal(stage.teacher, before.end)
        assert not torch.equal(stage.end, before.end)
    logged, names = ["model,update,loss,grad_norm,lr"], ("teacher", "student-2", "student-1")
    for name, (model, record), stage in zip(names, ladder.models.values(), ladder.stages, strict=True):
        assert (record["name"], record["steps"], record["updates"]) == (name, stage.steps, stage.updates)
        assert not {"optimizer", "average"} & record.keys() and record["seconds"] > 0
        assert record["log"] == stage.log and torch.equal(numbers(model), stage.end)
        logged += [",".join([name, *map(str, row.values())]) for row in stage.log]
    assert (ladder.out / "log.csv").read_text().split() == logged

def test_figures_are_those_of_an_independent_computation(pd, ladder, pictures, capsys):
    """Features by a hook, distances by scipy, samples by the float64 reference. Table and plots show them."""
    def distance(drawn):
        found = []                                              # what leaves the middle of the network
        with torch.no_grad(), net.middle2.register_forward_hook(lambda layer, inputs, h: found.append(h)):
            for x in (images, drawn):
                z = ref.alpha_sigma(0.1)[0] * (x.double() / 127.5 - 1)
                net(z.float(), torch.full((len(z),), 0.1))
        return ref.frechet_distance(*(h.mean((2, 3)) for h in found))
    (teacher, record), images, samples = ladder.models[4], pd.load_dataset(str(pictures))[0], {}
    rows, found = pd.evaluate(ladder.models, images, pd.Config(**record["config"]), "cpu")
    (model, calls), net = recorded(teacher), teacher.net
    pd.generate(model, 30, (1, 8, 6), 1)
    for row, (steps, (model, record)) in zip(rows, ladder.models.items(), strict=True):
        for who, denoiser in (("student", model), ("teacher", teacher)):
            exact = ref.walk(lambda z, t: denoiser(z.float(), t), calls[0][0], 1.0, 0.0, steps)
            samples[f"{who}, {steps}"] = pixels(exact.detach())
        student, ddim = samples[f"student, {steps}"], samples[f"teacher, {steps}"]
        drift = ((student - samples["teacher, 4"]) / 127.5).square().mean().sqrt().item()
        figures = {"steps": steps, "distilled": distance(student), "ddim": distance(ddim),
                   "ancestral": distance(pd.generate(teacher, 30, (1, 8, 6), steps, "ancestral")),
                   "drift": drift, "seconds": record["seconds"], "updates": record["updates"]}
        assert row == pytest.approx(figures, rel=3e-3, abs=1e-6) and list(row) == list(figures)
    assert rows == json.loads((ladder.out / "results.json").read_text())["rows"]
    head, *table = [line.split() for line in capsys.readouterr().out.splitlines()[-4:]]
    for row, line in zip(rows, table):
        assert dict(zip(head, map(float, line), strict=True)) == pytest.approx(row, rel=1e-3, abs=1e-9)
    curves = {line.get_label(): [*line.get_ydata()] for line in pd.plot_steps(rows).axes[0].lines}
    assert curves == {name: [row[name] for row in rows] for name in ("distilled", "ddim", "ancestral")}
    (axes,) = pd.plot_samples(found).axes
    assert [tick.get_text() for tick in axes.get_yticklabels()] == list(found) and len(found) == 5
    shown = np.asarray(axes.get_images()[0].get_array())
    for row, (label, drawn) in zip(shown.reshape(5, -1, shown.shape[1]), found.items()):
        assert (drawn - samples[label]).abs().max() <= 1, label
        assert (row[1:9, 1:7] == drawn[0, 0].numpy()).all()                     # inside of a white frame

def test_every_setting_reaches_its_place(pd, pictures, tmp_path, monkeypatch):
    """Of a preset and of flags, which come first: at `train`, in the network and at the samplers."""
    def train(model, data, updates, **options):
        stages.append(options | {"updates": updates})
        return [{"loss": 0.0}]
    stages, seeds = [], set()
    monkeypatch.setattr(pd, "train", train)
    monkeypatch.setattr(pd, "set_seed", lambda seed, *key: seeds.add(seed))
    monkeypatch.setitem(pd.PRESETS, "odd", dict(flip=True, mults=(1, 3), attention=(2,), lr=9.0))
    passed = dict(substeps=4, weighting="snr+1", batch_size=6, warmup=3, decay=0.75, ema=0.8, seed=5)
    flags = passed | dict(
        preset="odd", stages=2, final_steps=5, param="both", width=12, blocks=2, patch=2, dropout=0.25,
        lr=0.004, student_lr=0.003, early_lr=0.002, teacher_updates=7, student_updates=4, early_share=0.5,
        save_every=5, eval_samples=9, device="cpu", dataset=pictures, out=tmp_path)
    assert command(pd, *(f"--{name.replace('_', '-')}={value}" for name, value in flags.items())) == 0
    found = [[stage[name] for name in ("steps", "updates", "lr")] for stage in stages]
    assert found == [[80, 7, 0.004], [20, 2, 0.002], [5, 4, 0.003]] and seeds == {5}
    assert all(stage.items() >= (passed | {"every": 5, "flip": True}).items() for stage in stages)
    denoiser, _ = pd.load_model(tmp_path / "student-20.pt")
    assert str(denoiser.net) == str(pd.UNet(1, 12, (1, 3), 2, (2,), 0.25, 2, 2))
    assert (denoiser.param, denoiser.net.patch, denoiser.net.middle1.dropout) == ("both", 2, 0.25)

# ---- 8. A run's files, resume, wrong input, many processes -------------------------------------------------
def refused(pd, capsys, *args):
    """The one line that wrong input leaves on stderr."""
    assert command(pd, *args) == 2
    *warnings, error = capsys.readouterr().err.splitlines()
    assert error.startswith("pd.py: error: ") and len(error) < 700 and "Traceback" not in "".join(warnings)
    return error

def contents(folder):
    return {file: file.is_dir() or file.read_bytes() for file in folder.rglob("*")}

def same_run(a, b, off=0):
    """Two runs are equal but for their times, or off by so much: the weights, the log, the figures."""
    assert sorted(file.name for file in a.iterdir()) == sorted(file.name for file in b.iterdir())
    for file in a.glob("*.pt"):
        one, two = (torch.load(folder / file.name, weights_only=True) for folder in (a, b))
        x, y = (torch.cat([w.flatten() for w in record["model"].values()]) for record in (one, two))
        assert one.keys() == two.keys() and (x - y).norm() <= off * x.norm(), file.name
        assert one["log"] == [pytest.approx(row, rel=100 * off, abs=0) for row in two["log"]]
    one, two = (json.loads((folder / "results.json").read_text()) for folder in (a, b))
    for row, other in zip(one["rows"], two["rows"], strict=True):
        assert row == pytest.approx(other | {"seconds": row["seconds"]}, rel=1000 * off, abs=100 * off)

def test_only_restart_overwrites_a_run(pd, ladder, pictures, tmp_path, capsys):
    """The same command again changes nothing, other settings are refused; nothing is left after --restart."""
    out = shutil.copytree(ladder.out, tmp_path / "run")
    same, before = [*TINY, "--dataset", pictures, "--out", out], contents(out)
    assert command(pd, *same) == 0 and "finished" in capsys.readouterr().out
    error = refused(pd, capsys, *same, "--width", 16, "--seed", 3)
    assert before == contents(out) and all(word in error for word in ("seed 0, not 3", "width", "--restart"))
    (out / "teacher.pt.part").write_text("left by a process that was killed")
    assert command(pd, *same, "--stages", 1, "--restart") == 0
    left = " ".join(sorted(file.name for file in out.iterdir()))
    assert left == "config.json log.csv results.json samples.png steps.png student-1.pt teacher.pt"

def test_sample_writes_the_same_pictures_as_a_grid_an_npz_or_a_folder(pd, tmp_path, monkeypatch, capsys):
    """In colour, as the flags say, of a resized folder's run in its default place; never into another's."""
    monkeypatch.chdir(tmp_path)
    save_pictures(Path("mine/a"), np.random.default_rng(0).integers(0, 256, (6, 20, 24, 3)), "jpg")
    assert command(pd, *TINY, "--dataset", "mine", "--size", 8) == 0
    sample = "--sample", "runs/mine/student-2.pt", "--num", 5
    for flags, options in (((), {}), (("--steps", 8, "--clip"), {"steps": 8, "clip": True}),
                           (("--sampler", "heun"), {"sampler": "heun"}), (("--seed", 7), {"seed": 7})):
        assert command(pd, *sample, *flags, "--out", "deep/er.npz") == 0
        expected = pd.generate(pd.load_model(sample[1])[0], 5, (3, 8, 8), **{"steps": 2} | options)
        expected = expected.permute(0, 2, 3, 1).numpy()
        assert (np.load("deep/er.npz")["arr_0"] == expected).all()
    assert command(pd, *sample, *flags, "--out", "grid.png") == 0
    grid = np.array(Image.open("grid.png"))[::4, ::4].reshape(2, 8, 3, 8, 3)    # 2 rows, 3 columns, enlarged
    assert (grid.swapaxes(1, 2).reshape(6, 8, 8, 3) == [*expected, 0 * expected[0]]).all()      # one is black
    assert command(pd, *sample, *flags, "--out", "folder") == 0
    assert (np.stack([Image.open(file) for file in sorted(Path("folder").iterdir())]) == expected).all()
    assert "folder" in refused(pd, capsys, *sample, "--out", "folder") and len(contents(Path("folder"))) == 5

CORNER = {"file": "a file", "text/a.png": "no picture", "text/b.png": "no picture", "empty/.a.png": "hidden",
          "foreign/teacher.pt": "somebody's", "damaged/config.json": "{", "one/a.pgm": "P2 1 1 255 9",
          "mixed/a.pgm": "P2 1 1 255 9", "mixed/b.pgm": "P2 2 1 255 9 9", "deep/a.pgm": "P2 1 1 65535 9",
          "deep/b.pgm": "P2 1 1 65535 9", "evil.pt": "cos\nmkdir\n(S'evil'\ntR."}     # calls os.mkdir("evil")
GOOD = "run/student-1.pt"
WRONG = {                                                       # words that the error holds: what is given
    "no data set": ["--dataset nothing"], "0 pictures": ["--dataset empty"], "at least 2": ["--dataset one"],
    "a.png is not a readable": ["--dataset text"], "--size 1": ["--dataset mixed"],
    "8 bits": ["--dataset deep"], "could not be loaded": ["--dataset mnist", "--dataset cifar10"],
    "--device": ["--device tpu"] + ["--device cuda"] * (not torch.cuda.is_available()),
    "no checkpoint": ["--out run", "--sample run/student-2.pt", "--sample missing.pt", "--sample foreign.pt",
                      "--sample .", "--sample file", "--sample evil.pt", "--sample wide.pt"],
    "--restart": ["--out foreign", "--out damaged"], "8,192": ["--stages 13 --substeps 3"],
    "file": ["--out file", "--out file/x", f"--sample {GOOD} --out file", f"--sample {GOOD} --out file/x"],
    "argument": ["--stages x", "--lr", "--unknown", "--stage 3"],
    "invalid choice": ["--param w", "--weighting none", "--preset huge", f"--sample {GOOD} --sampler e"],
    "needs --sample": ["--num 3", "--clip"], "does not go with --sample": [f"--sample {GOOD} --lr 1"],
    "must be from 1 to": [f"--sample {GOOD} --num 0", f"--sample {GOOD} --steps 0"] + [
        f"--{name} 0" for name in "stages size final-steps teacher-updates batch-size width".split()],
    "must be from 2 to": ["--substeps 1", "--eval-samples 1"], "finite": ["--lr 1e9 --teacher-updates 40"],
    "must be from 0 to": ["--seed -1", "--warmup -1", "--lr nan", "--student-lr inf", "--ema 2"]}

@pytest.mark.parametrize("words, wrong", [(words, wrong) for words in WRONG for wrong in WRONG[words]])
def test_wrong_input_leaves_one_line_only(pd, words, wrong, ladder, pictures, tmp_path, monkeypatch, capsys):
    """The line says what is wrong; nothing is written, nothing is downloaded, no code in a file is run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    for file, text in CORNER.items():
        Path(file).parent.mkdir(exist_ok=True)
        Path(file).write_text(text)
    shutil.copytree(ladder.out, "run")
    os.truncate("run/student-2.pt", 9000)
    torch.save({"weights": torch.zeros(3)}, "foreign.pt")
    record, run = ladder.models[2][1], [] if "--sample" in wrong else [*TINY, "--dataset", pictures]
    torch.save(record | {"config": record["config"] | {"width": 16}}, "wide.pt")
    before = contents(tmp_path)
    assert words in refused(pd, capsys, *run, *wrong.split())
    assert words == "finite" or before == contents(tmp_path)                # its last good state stays

def begin(*line, threads=1):
    return subprocess.Popen([sys.executable, *map(str, line)], text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": str(threads)})

def test_a_run_stopped_at_any_moment_ends_as_if_it_had_not_been(pd, pictures, tmp_path, monkeypatch, capsys):
    """In a file, before it is in its place, between updates; also where a process was really killed."""
    def failing(*args):                                         # stands for the function of that name
        calls.append(args)
        if len(calls) < number:
            return function(*args)
        if name == "write_bytes":                               # half of the file is there
            function(args[0], args[1][:1000])
        raise error
    whole, once, often = tmp_path / "whole", tmp_path / "once", tmp_path / "often"
    run = [*TINY, "--save-every", 6, "--dataset", pictures, "--out"]
    assert command(pd, *run, whole) == 0
    process = begin(pd.__file__, *run, once, threads=torch.get_num_threads())
    while not (once / "teacher.pt").exists() and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    process.wait(60)
    assert command(pd, *run, once) == 0
    same_run(whole, once)
    places = (Path, "write_bytes"), (os, "replace"), (pd, "set_seed")
    ends = (SystemExit(-9), -9, ""), (OSError("full"), 2, "full"), (KeyboardInterrupt(), 130, "stopped")
    for attempt, ((place, name), (error, status, words)) in enumerate(2 * list(product(places, ends))):
        function, calls, number = getattr(place, name), [], max(3, attempt - 5)  # one save is made, or more
        with monkeypatch.context() as patch:
            patch.setattr(place, name, failing)
            found = command(pd, *run, often)
        errors = capsys.readouterr().err
        if found == 0 and attempt > 9:
            break
        assert found == status and words in errors and errors.count("\n") == (status > 0)
        model, record = pd.load_model(often / "teacher.pt")     # its average, also half-way
        assert record["updates"] == (12 if attempt > 0 else 6)
        assert all(map(torch.equal, record.get("average", []), model.parameters()))
    same_run(whole, often)

@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs torchrun")
def test_two_processes_train_the_model_that_one_trains(pd, pictures, tmp_path):
    """To 1e-5, with dropout; two agents on the loopback are two machines."""
    one, two, run = tmp_path / "one", tmp_path / "two", [*TINY, "--eval-samples", 300, "--dataset", pictures]
    assert command(pd, *run, "--out", one) == 0
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    line = ("-m", "torch.distributed.run", "--rdzv-backend", "c10d", "--local-addr", "127.0.0.1", "--nnodes",
            2, "--rdzv-endpoint", address, pd.__file__, *run, "--out", two)
    agents = [begin(*line) for _ in range(2)]
    try:
        outputs = [agent.communicate(timeout=400)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    assert sum("is finished" in output for output in outputs) == 1              # one process speaks
    same_run(one, two, 1e-5)

@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("flag", ["--no-compile", "--compile"])
def test_gpu_trains_and_draws_what_the_cpu_draws(pd, pictures, tmp_path, flag):
    z, run = torch.randn(16, 1, 8, 8), [*TINY, "--device", "cuda", flag, "--dataset", pictures]
    assert command(pd, *run, "--out", tmp_path) == 0
    exact, other = (pd.sample(pd.load_model(tmp_path / "student-1.pt", device)[0], z.to(device), 1).cpu()
                    for device in ("cpu", "cuda"))
    assert (exact - other).std() < 0.05 * exact.std()                           # within bfloat16

# ---- 9. The README and the notebook ------------------------------------------------------------------------

def test_readme_names_functions_and_tests_that_exist():
    lines = (HERE / "README.md").read_text(encoding="utf8").splitlines()
    names = {name for line in lines if "| `test_" in line for name in re.findall(r"`([a-zA-Z]\w+)`", line)}
    assert names and not [name for name in names if name not in globals() and not hasattr(official, name)]

def notebook():
    return json.loads((HERE / "tutorial.ipynb").read_text(encoding="utf8"))["cells"]

def test_notebook_is_short_and_was_run_once_from_top_to_bottom():
    """No errors, no warnings, nothing that needs a program to be seen."""
    code = [cell for cell in notebook() if cell["cell_type"] == "code"]
    outputs = [output for cell in code for output in cell["outputs"]]
    kinds = [kind for output in outputs for kind in output.get("data", {})]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert set(kinds) <= {"image/png", "text/plain"} and kinds.count("image/png") <= 21
    lines = [line for cell in code for line in "".join(cell["source"]).splitlines() if line.strip()]
    assert len(lines) <= 760 and len(notebook()) <= 110

def test_exercises_of_the_notebook_fail_when_unsolved_and_pass_when_solved(monkeypatch):
    """Cells are tagged setup, exercise:NAME, answer:NAME (hidden, into ANSWERS) and check:NAME."""
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.chdir(HERE)
    tagged, space = collections.defaultdict(str), {"__name__": "notebook"}
    for cell in notebook():
        for tag in cell["metadata"].get("tags", []):
            tagged[tag] += "".join(cell["source"]) + "\n"
    exec(tagged["setup"], space)
    names = [tag.partition(":")[2] for tag in tagged if tag.startswith("exercise:")]
    assert len(names) >= 8
    for name in names:
        exec(tagged[f"exercise:{name}"], space)
        space["ANSWERS"].clear()
        with pytest.raises(NotImplementedError):
            exec(tagged[f"check:{name}"], space)
        exec(tagged[f"answer:{name}"] + tagged[f"check:{name}"], space)

# ---- 10. Benchmark, seeds, command line --------------------------------------------------------------------
def speed(job, *args, **options):
    """(seconds, TFLOP/s, seconds that the first call takes more: compiling) of job(*args, **options)."""
    from torch.utils.benchmark import Timer
    from torch.utils.flop_counter import FlopCounterMode
    job, began = functools.partial(job, *args, **options), time.monotonic()
    job()
    first = time.monotonic() - began
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        job()
    timer = Timer("job()", globals={"job": job}, num_threads=torch.get_num_threads())
    seconds = timer.adaptive_autorange(max_run_time=60).median
    return seconds, counter.get_total_flops() / seconds / 1e12, max(0.0, first - seconds)

def benchmark(args):
    """Print how fast training and sampling are, and their share of the best that this machine can do."""
    args, chunk = official.parse_args(args.flags), official.CHUNK
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    shape, cuda = (1, 8, 8) if args.dataset in (None, "digits") else (3, 32, 32), device.type == "cuda"
    data = torch.randint(256, (1024, *shape), dtype=torch.uint8, device=device)
    config = official.configure(args, data, device)
    model, teacher = official.build(config, device), official.build(config, device)
    for denoiser in (model, teacher):
        denoiser.net.compile(disable=not (cuda if args.compile is None else args.compile))
    normal = functools.partial(torch.randn, device=device, dtype=torch.bfloat16 if cuda else torch.float32)
    B, sizes = config.batch_size, (4096, 8192, 16384) if cuda else (1024, 2048)
    matmul = max(speed(torch.mm, normal(size, size), normal(size, size))[1] for size in sizes)
    conv = max(speed(torch.conv2d, normal(B, size, size, width).movedim(3, 1), normal(width, width, 3, 3),
                     padding=1)[1] for width, size in ((32, 8), (64, 8), (128, 16), (256, 16)))
    print(f"{device.type}: best matmul {matmul:.3f}, best 3x3 convolution {conv:.3f} TFLOP/s")
    train = functools.partial(official.train, model, data, 10, batch_size=B, flip=config.flip)
    draw = functools.partial(official.generate, model, chunk, shape, device=device)
    distill = functools.partial(train, teacher=teacher, steps=4)
    jobs = (("teacher update", 10 * B, train), ("student update", 10 * B, distill),
            ("sampling, 1 step", chunk, draw, 1), ("sampling, 256 steps", chunk, draw, 256))
    for name, pictures, job, *steps in jobs:
        seconds, tflops, compiling = speed(job, *steps)
        memory = f", peak {torch.cuda.max_memory_allocated() / 1e9:.2f} GB" if cuda else ""
        print(f"{name:20}{pictures / seconds:12,.0f} images/s{tflops:12.6f} TFLOP/s, "
              f"{tflops / matmul:.0%} of the best matmul, {tflops / conv:.0%} of the best convolution, "
              f"compiling {compiling:.1f} s{memory}", flush=True)

def test_benchmark_measures_updates_and_sampling(capsys, monkeypatch):
    """A student's update costs 5/3 of a teacher's, and 256 steps 256 times one."""
    half_a_second = types.SimpleNamespace(median=0.5)
    monkeypatch.setattr("torch.utils.benchmark.Timer.adaptive_autorange", lambda *_, **options: half_a_second)
    monkeypatch.setattr(official, "CHUNK", 2)
    main("benchmark --width 8 --batch-size 4 --device cpu --no-compile".split())
    found = re.findall(r"(\d+) images/s +([\d.]+) TFLOP/s", capsys.readouterr().out)
    speeds, tflops = np.array(found, float).T
    assert list(speeds) == [80, 80, 4, 4]
    assert tflops[1::2] / tflops[::2] == pytest.approx([5 / 3, 256], rel=0.1)

def seeds(args):
    """Print the README's table: raw-pixel Fréchet distances of the digits, for so many seeds."""
    real, rows = official.load_dataset("digits")[0].flatten(1) / 127.5, []
    draws = ("teacher", 256), ("student-4", 4), ("student-2", 2), ("student-1", 1)
    for seed in range(args.number):
        out = Path(f"runs/seed-{seed}")
        if not (out / "results.json").exists():
            official.main(["--seed", str(seed), "--out", str(out)])
        rows.append([])
        for name, steps in (*draws, ("teacher", 4), ("teacher", 2), ("teacher", 1)):
            model, _ = official.load_model(out / f"{name}.pt")
            drawn = official.generate(model, len(real), (1, 8, 8), steps, seed=seed)
            rows[-1].append(official.frechet_distance(real, drawn.flatten(1) / 127.5))
    print("| seed | teacher, 256 steps | student, 4 | 2 | 1 | the same teacher's DDIM, 4 | 2 | 1 |")
    print("|---:" * 8 + "|")
    for seed, (teacher, *others) in [*enumerate(rows), ("mean", np.mean(rows, 0))]:
        cells = [f"{distance:.3f} ({distance / teacher:.2f}x)" for distance in others[:3]]
        cells += [f"{distance:.2f}" for distance in others[3:]]
        print(f"| {seed} | {teacher:.3f} | {' | '.join(cells)} |")

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("handout")
    command.add_argument("file")
    command.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="NAME")
    command = commands.add_parser("grade")
    command.add_argument("files", nargs="+")
    command.add_argument("--hint", choices=EXERCISES)
    command.add_argument("--json", metavar="OUT")
    command = commands.add_parser("hunt")
    command.add_argument("number", type=int, choices=range(1, len(HUNTS) + 1))
    command.add_argument("file", nargs="?")
    command.add_argument("--answer", action="store_true")
    commands.add_parser("benchmark", usage="test_pd.py benchmark [flags of pd.py]")
    commands.add_parser("seeds").add_argument("number", type=int, nargs="?", default=3)
    args, flags = parser.parse_known_args(argv)
    args.flags = flags
    if flags and args.command != "benchmark":
        parser.error(f"unrecognized arguments: {' '.join(flags)}")
    try:
        if args.command == "handout":
            write_new(args.file, handout(args.only))
            print(f"Fill it in, then: python test_pd.py grade {args.file}")
        else:
            {"grade": grade_files, "hunt": hunt, "benchmark": benchmark, "seeds": seeds}[args.command](args)
    except (OSError, ValueError) as error:
        parser.error(" ".join(str(error).split()))

if __name__ == "__main__":
    main()
