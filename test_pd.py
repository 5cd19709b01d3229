"""The tests of pd.py, and the classroom kit that is made of them.

    python -m pytest test_pd.py                        # every test
    python test_pd.py handout FILE [--only NAME ...]   # a copy of pd.py with the exercises taken out
    python test_pd.py grade FILE... [--json OUT]       # what filled-in copies get right, and what is wrong
    python test_pd.py grade FILE --hint NAME           # one exercise, and one sentence more about it
    python test_pd.py hunt N FILE                      # a copy of pd.py with a mistake, and its symptom
    python test_pd.py hunt N --answer                  # what mistake N is, and why
    python test_pd.py benchmark                        # the speed of training and sampling on this machine
    python test_pd.py seeds                            # the README's table: the digits with several seeds

In every test the docstring is the property, and the failure says where it does not hold. A test takes the
module under test as `pd`: the file that the environment variable PD_FILE names, or pd.py itself. Equations
and algorithms are those of Salimans & Ho, arXiv:2202.00512.
"""
import argparse, ast, collections, contextlib, copy, csv, functools, inspect, io, json, math, os, pickle
import random, re, shutil, signal, socket, subprocess, sys, tempfile, textwrap, threading, time, types
import _thread
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import pd as official

# ---- 1. Reference: the paper once more, in float64 and in log-SNR form, written without a look at pd.py ----

class ref:
    """α² = sigmoid(λ), σ² = sigmoid(-λ). The names and signatures of pd.py, and a few more."""

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
    def exact_output(x, eps, t, param):
        """What a perfect network says."""
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
    def weighted_loss(model, x_target, z, t, weighting):
        """Section 4's losses without any weight: as errors of x, of ε, of the worse of the two, and of v."""
        def mse(p, q):
            return (p - q).square().reshape(len(z), -1).mean(1)
        x, x_hat, z, (a, s, _) = x_target.double(), model(z, t)[0].double(), z.double(), ref.at(z, t)
        eps, eps_hat = (z - a * x) / s, (z - a * x_hat) / s
        return {"constant": mse(x, x_hat), "snr": mse(eps, eps_hat),
                "truncated": torch.maximum(mse(x, x_hat), mse(eps, eps_hat)),
                "snr+1": mse(a * eps - s * x, a * eps_hat - s * x_hat)}[weighting]
    def ddim_step(x_hat, eps_hat, s):
        return ref.noisy(x_hat.double(), eps_hat.double(), s)
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
    def ancestral_step(x_hat, z, t, s, noise_scale=1.0):
        mean, std = ref.ancestral(x_hat, z, t, s, noise_scale)
        return mean + std * torch.randn_like(z).double()
    def heun_step(model, x_hat, eps_hat, z, t, s):
        """The trapezoidal rule for dz = x̂ dα + ε̂ dσ."""
        (a_t, s_t, _), (a_s, s_s, _) = ref.at(z, t), ref.at(z, s)
        x_end, eps_end = model(ref.ddim(x_hat, z, t, s).to(z), s)
        return z + (a_s - a_t) * (x_hat + x_end) / 2 + (s_s - s_t) * (eps_hat + eps_end) / 2
    def sample(model, z, steps, sampler="ddim", clip=False, noise_scale=1.0):
        def predict(z, t):
            x_hat = model(z, t)[0].double()
            return ref.to_x_eps(x_hat.clamp(-1, 1) if clip else x_hat, z, t, "x")
        z = z.double()
        for i in reversed(range(steps)):
            t, s = (i + 1) / steps, i / steps
            x_hat, eps_hat = predict(z, t)
            if sampler == "ddim" or i == 0:
                z = ref.ddim(x_hat, z, t, s)
            elif sampler == "ancestral":
                z = ref.ancestral_step(x_hat, z, t, s, noise_scale)
            else:
                z = ref.heun_step(predict, x_hat, eps_hat, z, t, s)
        return z
    def land(teacher, z, t, s, substeps):
        """Where the teacher's DDIM steps end."""
        times = [t + (s - t) * i / substeps for i in range(substeps)] + [s]
        for start, end in zip(times, times[1:]):
            z = ref.ddim(teacher(z, start)[0], z, start, end)
        return z
    def distill_target(teacher, z, t, s, substeps=2):
        """Algorithm 2: x̃ = (z_s - (σ_s/σ_t) z_t) / (α_s - (σ_s/σ_t) α_t)."""
        (a_t, s_t, _), (a_s, s_s, _) = ref.at(z, t), ref.at(z, s)
        z_s = ref.land(teacher, z.double(), t, s, substeps)
        return (z_s - s_s / s_t * z.double()) / (a_s - s_s / s_t * a_t)
    def time_embedding(t, dim):
        angle = 1000 * t.double()[:, None] * 10000.0 ** (-torch.arange(dim // 2) / (dim // 2))
        return torch.cat([torch.cos(angle), torch.sin(angle)], 1)
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

def gaussian_path(z, t, s, mean, variance):
    """The probability-flow map from z_t to z_s for x ~ N(mean, variance): (z - α mean) / sd(z) is kept."""
    (a_t, s_t), (a_s, s_s) = ref.alpha_sigma(t), ref.alpha_sigma(s)
    growth = (a_s**2 * variance + s_s**2) / (a_t**2 * variance + s_t**2)
    return a_s * mean + (z - a_t * mean) * growth.sqrt()

def always(value):
    """The exact denoiser of data that are all one value."""
    return says(lambda z, a, s: torch.full_like(z, value))

two_points = says(lambda z, a, s: torch.tanh(a * z / s**2))     # exact for x = ±1, each half the time

def constantly(x_hat, eps_hat):
    """A denoiser that always says the same."""
    return lambda z, t: (x_hat, eps_hat)

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
SHAPES = ((3, 1, 4, 4), (3, 2), (3,))                           # pictures first, then points, then numbers
DRAWS, DATA = 100_000, torch.full((8, 2), 0.5)
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
    "heun_step": ("the trapezoidal rule", "Ask where DDIM ends, then start again from z with the means."),
    "sample": ("the sampler's loop", "Do N = 2 on paper: at which t is the model asked, to which s it goes."),
    "distill_target": ("x̃", "z_s = α_s x̃ + σ_s (z_t - α_t x̃) / σ_t is linear in x̃. And for s near t?"),
    "train": ("the lines of Algorithm 2, the student's t and its target", "Which t does its sampler visit?"),
    "time_embedding": ("cosines and sines of t", "Of the dim/2 frequencies the k-th is 10000^(-k/(dim/2))."),
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
    """At which inputs a property fails."""

def check(condition, failure):
    if not condition:
        raise Wrong(failure)

def close(got, expected, what, rtol=1e-5, atol=0.0):
    """|got - expected| <= atol + rtol |expected| everywhere."""
    check(torch.is_tensor(got), f"{what} is no tensor but {type(got).__name__}")
    expected = expected if torch.is_tensor(expected) else torch.full(got.shape, expected, dtype=torch.float64)
    check(got.shape == expected.shape, f"{what} has shape {tuple(got.shape)}, not {tuple(expected.shape)}")
    got, expected = got.detach().double().flatten(), expected.double().flatten()
    excess = ((got - expected).abs() - atol - rtol * expected.abs()).nan_to_num(math.inf)
    if (excess > 0).any():
        worst = excess.argmax()
        short, long = ([f"{n[worst]:.{digits}g}" for n in (got, expected)] for digits in (5, 9))
        raise Wrong("{} is {}, not {}".format(what, *(short if short[0] != short[1] else long)))

def for_shape(shape, function, *args):
    """function(*args), where a failure says for which shape it fails."""
    try:
        return function(*args)
    except (IndexError, RuntimeError) as error:
        if isinstance(error, NotImplementedError):
            raise
        raise Wrong(f"for data of shape {shape} it fails with {type(error).__name__}: {error}") from error

def listing(values):
    values = [f"{float(v):.5g}" for v in values]
    return ", ".join(values[:8]) + ", ..." * (len(values) > 8)

def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

def example(t, *shape):
    """(x, ε, z_t)"""
    x, eps = normal(*shape, seed=1), normal(*shape, seed=2)
    return x, eps, ref.noisy(x, eps, t)

def output(exercise, *shape):
    """What a network might say, which has twice the channels for "both"."""
    out = normal(*shape, seed=3)
    return torch.cat([out, out.flip(1) - 0.7], 1) if exercise == "both" else out

@graded("alpha_sigma")
def test_alpha_sigma_preserve_the_variance(pd):
    """α_t² + σ_t² = 1 at every t, a float or a (B,) tensor"""
    for t in (*TIMES, torch.tensor(TIMES)):
        alpha, sigma = pd.alpha_sigma(t)
        close(alpha**2 + sigma**2, 1.0, f"the sum at t = {t}")

@graded("alpha_sigma")
def test_alpha_sigma_begin_with_data_and_end_with_noise(pd):
    """z_t is data at t = 0, noise at t = 1, neither to the last bit: the log-SNR runs from 20 to -20"""
    for t, expected in ((0.0, 20.0), (1.0, -20.0)):
        alpha, sigma = pd.alpha_sigma(t)
        close(torch.log(alpha**2 / sigma**2), expected, f"log(α_t²/σ_t²) at t = {t:g}")

@graded("alpha_sigma")
def test_angle_of_alpha_sigma_is_linear_in_t(pd):
    """(α_t, σ_t) walks along the circle at constant speed, from almost (1, 0) to almost (0, 1)"""
    first = math.degrees(math.atan(math.exp(-10)))
    for t in INNER:
        alpha, sigma = pd.alpha_sigma(t)
        degrees = torch.atan2(sigma, alpha) * 180 / math.pi
        close(degrees, first + t * (90 - 2 * first), f"its angle in degrees at t = {t:g}")

@graded("alpha_sigma")
def test_alpha_sigma_keep_their_digits_in_float32(pd):
    """α_t and σ_t keep their digits in float32 where they are almost 0 (a cosine near π/2 does not)"""
    t = torch.tensor(TIMES)
    for name, got, expected in zip("ασ", pd.alpha_sigma(t), ref.alpha_sigma(t)):
        check(torch.is_tensor(got) and got.dtype == t.dtype, f"{name}_t is no float32 tensor")
        for clock, one, other in zip(TIMES, got, expected):
            close(one, other, f"{name}_t for the float32 t = {clock:.5g}")

@graded("log_snr")
def test_log_snr_runs_from_20_to_minus_20(pd):
    """λ_t = log(α_t²/σ_t²) is 20 at t = 0, 0 where α_t = σ_t, and -20 at t = 1"""
    for t, expected in ((0.5, 0.0), (0.0, 20.0), (1.0, -20.0)):
        close(pd.log_snr(t), expected, f"λ_t at t = {t:g}", atol=1e-9)

@graded("log_snr")
def test_log_snr_is_the_log_of_the_ratio_of_powers(pd):
    """exp(λ_t) is the power of the signal α_t x over that of the noise σ_t ε, for x and ε of variance 1"""
    t = torch.tensor(TIMES)
    for clock in INNER:
        close(pd.log_snr(clock).exp(), ref.log_snr(clock).exp(), f"exp(λ_t) at t = {clock:g}")
    close(pd.log_snr(t), ref.log_snr(t), "λ_t for a (B,) tensor t of float32", atol=1e-6)

@graded(*PARAMS)
def test_exact_output_gives_back_x_and_eps(pd, exercise):
    """a network that is right gives back the x and ε that z_t = α_t x + σ_t ε was made of, x first"""
    for t in INNER:
        x, eps, z = example(t, 2, 3, 4, 4)
        x_hat, eps_hat = pd.to_x_eps(ref.exact_output(x, eps, t, exercise), z, t, exercise)
        close(x_hat, x, f"x̂ at t = {t:g}")
        close(eps_hat, eps, f"ε̂ at t = {t:g}")

@graded(*PARAMS)
def test_x_hat_and_eps_hat_add_up_to_z(pd, exercise):
    """x̂ and ε̂ name one point on one line: α_t x̂ + σ_t ε̂ = z, whatever the network says"""
    for t in INNER:
        z, out = normal(2, 3), output(exercise, 2, 3)
        close(ref.noisy(*pd.to_x_eps(out, z, t, exercise), t), z, f"the sum at t = {t:g}")

@graded("v", "both")
def test_at_the_ends_of_time_z_says_it_all(pd, exercise):
    """at t = 0 z is the data, so x̂ = z, and at t = 1 the noise, so ε̂ = z, whatever the network says"""
    z, out = normal(2, 3), output(exercise, 2, 3)
    close(pd.to_x_eps(out, z, 0.0, exercise)[0], z, "x̂ at t = 0", atol=1e-3)
    close(pd.to_x_eps(out, z, 1.0, exercise)[1], z, "ε̂ at t = 1", atol=1e-3)

@graded(*PARAMS)
def test_x_hat_and_eps_hat_for_any_shape_and_a_t_per_example(pd, exercise):
    """x̂ and ε̂ are right for pictures, waves and points with a t for each example, and any output"""
    for shape in ((5, 2, 4, 4), (5, 2, 4), (5, 2)):
        z, out, t = normal(*shape), output(exercise, *shape), torch.tensor(INNER, dtype=torch.float64)
        got = for_shape(shape, pd.to_x_eps, out, z, t, exercise)
        for name, one, other in zip("xε", got, ref.to_x_eps(out, z, t, exercise)):
            close(one, other, f"{name}̂ for z of shape {shape} and t = {listing(t)}")

@graded("loss_weight")
def test_loss_weights_make_the_eps_loss_and_the_v_loss(pd):
    """w ||x - x̂||² is ||ε - ε̂||² with "snr", ||v - v̂||² with "snr+1" and ||x - x̂||² with "constant" """
    for t, (weighting, param) in product(INNER, (("snr", "eps"), ("snr+1", "v"), ("constant", "x"))):
        (x, eps, z), x_hat = example(t, 1, 1), normal(1, 1, seed=3)
        _, eps_hat = ref.to_x_eps(x_hat, z, t, "x")
        loss = (ref.exact_output(x, eps, t, param) - ref.exact_output(x_hat, eps_hat, t, param))**2
        close(pd.loss_weight(t, weighting) * (x - x_hat)**2, loss, f"the {weighting!r} loss at t = {t:g}")

@graded("loss_weight")
def test_truncated_weight_makes_the_larger_loss(pd):
    """w is the larger of the SNR and 1 with "truncated": a one-step student works at t = 1, and it counts"""
    for t in (1.0, 0.75, 0.5, 0.25, 0.1, 0.0):
        close(pd.loss_weight(t, "truncated"), ref.loss_weight(t, "truncated"), f"w at t = {t:g}")

@graded("loss_weight")
def test_loss_weights_of_a_batch_are_finite(pd):
    """w has the shape of t and is finite in float32 at both ends"""
    t = torch.tensor([0.0, 1 / 8192, 0.3, 1.0])
    for weighting in WEIGHTINGS:
        got, expected = pd.loss_weight(t, weighting), ref.loss_weight(t, weighting)
        close(got, expected, f"w with {weighting!r} at t = {listing(t)}", 1e-4)

@graded("weighted_loss")
def test_weighted_loss_is_weight_times_mean_squared_x_error(pd):
    """the loss of a picture is w(λ_t) times the mean over its pixels of (x - x̂)²; ε̂ plays no part"""
    for weighting, t in product(WEIGHTINGS, INNER):
        x, eps, z = example(t, 2, 3, 4, 4)
        model = constantly(0.5 * x, eps + 7)
        close(pd.weighted_loss(model, x, z, t, weighting), ref.weighted_loss(model, x, z, t, weighting),
              f"the loss of two pictures with {weighting!r} at t = {t:g}")

def loss_of_each(pd, shape):
    """The losses of three examples of which the first is exact."""
    t = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    x, _, z = example(t, *shape)
    model = constantly(x + torch.arange(3.0).reshape(3, *[1] * (len(shape) - 1)), z)
    for weighting in ("constant", "snr"):
        got = for_shape(shape, pd.weighted_loss, model, x, z, t, weighting)
        close(got, ref.weighted_loss(model, x, z, t, weighting), f"the {weighting!r} loss of 3 examples of "
              f"shape {shape[1:]} at t = {listing(t)}, where x̂ is wrong by 0, 1 and 2,", atol=1e-9)

@graded("weighted_loss")
def test_weighted_loss_keeps_examples_apart(pd):
    """the loss of one picture has nothing to do with the others in the batch, and each has its own t"""
    loss_of_each(pd, SHAPES[0])

@graded("weighted_loss")
def test_weighted_loss_takes_points_and_numbers_too(pd):
    """the loss works for data of any shape: points (B, 2) and single numbers (B,) like pictures"""
    loss_of_each(pd, SHAPES[1])
    loss_of_each(pd, SHAPES[2])

@graded("ddim_step")
def test_ddim_step_keeps_x_and_eps(pd):
    """with the x and ε that z_t was made of, a step ends at the z_s that is made of the same x and ε"""
    for s in TIMES:
        x, eps, z = example(s, 2, 3)
        close(pd.ddim_step(x, eps, s), z, f"z_s at s = {s:g}")

@graded("ddim_step")
def test_ddim_step_is_equation_8(pd):
    """z_s is Equation 8's for any x̂ with ε̂ = (z_t - α_t x̂)/σ_t, for any shape, one s or one per example"""
    clocks = (1.0, 0.5), (0.5, 0.25), (torch.tensor([1.0, 0.5, 0.2]), torch.tensor([0.0, 0.3, 0.1]))
    for (t, s), shape in product(clocks, SHAPES):
        z, x_hat = normal(*shape), normal(*shape, seed=3)
        _, eps_hat = ref.to_x_eps(x_hat, z, t, "x")
        close(for_shape(shape, pd.ddim_step, x_hat, eps_hat, s), ref.ddim(x_hat, z, t, s),
              f"z_s of shape {shape} for t = {t}, s = {s}", atol=1e-6)

@graded("ancestral_step")
def test_ancestral_step_has_the_mean_of_the_posterior(pd):
    """the mean of z_s is that of q(z_s | z_t, x = x̂), Equation 3"""
    z, x_hat = torch.full((1, DRAWS), 0.8), torch.full((1, DRAWS), -0.5)
    for t, s in ((1.0, 0.5), (0.75, 0.5), (0.5, 0.25), (0.3, 0.1)):
        mean, std = ref.ancestral(x_hat, z, t, s)
        close(pd.ancestral_step(x_hat, z, t, s).double().mean(), mean.mean(),
              f"the mean for z_t = 0.8, x̂ = -0.5, t = {t:g}, s = {s:g}", 0.005, 0.02 * std.item())

@graded("ancestral_step")
def test_ancestral_step_interpolates_the_log_variance(pd):
    """the deviation is that of q(z_t | z_s), with σ_t, if noise_scale is 1, the default, and the posterior's,
    with σ_s, if it is 0; with 0.5 the log-variance is half way"""
    z, x_hat = torch.full((1, DRAWS), 0.8), torch.full((1, DRAWS), -0.5)
    options = (1.0, []), (0.0, [0.0]), (0.5, [0.5])
    for (noise_scale, option), (t, s) in product(options, ((1.0, 0.5), (0.3, 0.1))):
        deviation = ref.ancestral(x_hat, z, t, s, noise_scale)[1]
        close(pd.ancestral_step(x_hat, z, t, s, *option).double().std(), deviation,
              f"the deviation with noise_scale = {noise_scale:g} for t = {t:g}, s = {s:g}", 0.02)

@graded("ancestral_step")
def test_ancestral_step_draws_fresh_noise_for_every_number(pd):
    """every number gets its own noise, each time anew, and t and s may differ between examples"""
    t, s, x_hat = torch.tensor([0.9, 0.5]), torch.tensor([0.6, 0.1]), torch.full((2, DRAWS // 2), -0.5)
    (a, b), (c, _) = (pd.ancestral_step(x_hat, x_hat, t, s).double() for _ in range(2))
    for what, pair in (("two examples", (a, b)), ("two calls", (a, c)), ("neighbours", (a[1:], a[:-1]))):
        close(torch.corrcoef(torch.stack(pair))[0, 1], 0.0, f"the correlation of noise in {what}", atol=0.03)
    close(torch.stack([a.std(), b.std()]), ref.ancestral(x_hat, x_hat, t, s)[1].flatten(),
          "the deviation of two examples with t = 0.9, 0.5 and s = 0.6, 0.1", 0.03)

@graded("heun_step")
def test_heun_step_asks_the_model_where_the_ddim_step_ends(pd):
    """the model is asked once more, at time s and at the end of the DDIM step"""
    for t, s in ((1.0, 0.5), (0.5, 0.25)):
        z, (model, calls) = normal(2, 3, 4, 4), recorded(two_points)
        pd.heun_step(model, *two_points(z, t), z, t, s)
        check(len(calls) == 1, f"it is asked {len(calls)} times, for t = {t:g} and s = {s:g}")
        check(calls[0][1] == s, f"the time is {calls[0][1]} for t = {t:g} and s = {s:g}")
        close(calls[0][0], ref.land(two_points, z, t, s, 1), f"the z that it gets for t = {t:g}, s = {s:g}")

@graded("heun_step")
def test_heun_step_averages_both_ends(pd):
    """z moves by x̂ dα + ε̂ dσ with the mean of x̂ and the mean of ε̂ over both ends of the step, which is
    DDIM's step if the model never changes its mind"""
    for t, s in ((1.0, 0.5), (0.5, 0.25)):
        x, eps, z = example(t, 2, 3)
        for what, *end in (("the same x̂ and ε̂", x, eps), ("another x̂", -x, eps), ("another ε̂", x, -eps)):
            model = constantly(*end)
            close(pd.heun_step(model, x, eps, z, t, s), ref.heun_step(model, x, eps, z, t, s),
                  f"z_s with {what} at the end, t = {t:g}, s = {s:g},")

@graded("sample")
def test_sample_visits_uniform_times_from_1_down(pd):
    """N steps ask the model at t = 1, 1 - 1/N, ..., 1/N, and Heun at the end of each step but the last"""
    for sampler, steps in product(SAMPLERS, (1, 2, 5)):
        model, calls = recorded(two_points)
        pd.sample(model, normal(2, 1, 4, 4), steps, sampler)
        clocks = [i / steps for i in range(steps, 0, -1)]
        clocks = sorted(clocks + clocks[1:] * (sampler == "heun"), reverse=True)
        times = listing(t for _, t in calls)
        check(times == listing(clocks), f"{sampler} with N = {steps} asks at {times or 'no time'}")

@graded("sample")
def test_sample_with_ddim_and_heun_agrees_with_the_reference(pd):
    """N steps of DDIM or Heun end where N steps of Equation 8 or of the trapezoidal rule end"""
    z, model = normal(2, 3), gaussian(0.3, 1.5)
    for sampler, steps in product(("ddim", "heun"), (1, 2, 5, 16)):
        close(pd.sample(model, z, steps, sampler), ref.sample(model, z, steps, sampler),
              f"x after {steps} {sampler} steps")

@graded("sample")
def test_sample_clips_x_hat_and_moves_eps_hat_along(pd):
    """with clip, x̂ is held within [-1, 1] at every prediction, and ε̂ fits the clipped x̂ so that α_t x̂ +
    σ_t ε̂ = z_t"""
    z = 2 * normal(2, 3)
    for sampler, steps in product(("ddim", "heun"), (2, 5, 16, 1)):
        (model, calls), (same, expected) = recorded(gaussian(0.3, 1.5)), recorded(gaussian(0.3, 1.5))
        got, right = pd.sample(model, z, steps, sampler, True), ref.sample(same, z, steps, sampler, True)
        check(len(calls) == len(expected), f"{steps} {sampler} steps ask the model {len(calls)} times")
        close(calls[-1][0], expected[-1][0], f"z where the model is asked last in {steps} {sampler} steps")
        close(got, right, f"x after {steps} {sampler} steps")

@graded("sample")
def test_sample_ancestral_draws_all_steps_but_the_last(pd):
    """the ancestral sampler draws z_s, with the upper variance unless noise_scale says otherwise, but the
    last step is DDIM's: it adds no noise"""
    z = torch.full((1, DRAWS), 0.8)
    for noise_scale, options in ((1.0, {}), (0.0, {"noise_scale": 0.0})):
        model, calls = recorded(always(-0.5))
        x = pd.sample(model, z, 2, "ancestral", **options)
        check(len(calls) == 2, f"with N = 2 the model is asked {len(calls)} times")
        (mean, std), middle = ref.ancestral(0 * z - 0.5, z, 1.0, 0.5, noise_scale), calls[1][0]
        for what, got, expected in ("mean", middle.mean(), mean.mean()), ("deviation", middle.std(), std):
            close(got, expected, f"the {what} of z after one of two steps, noise_scale = {noise_scale:g},",
                  0.02, 0.01)
        close(x, ref.ddim(0 * z - 0.5, middle, 0.5, 0.0), f"x with noise_scale = {noise_scale:g}", atol=1e-6)

def target(pd, teacher, z, t, s, *substeps):
    """x̃, which is a mean of the teacher's predictions and can't be huge."""
    x_tilde = pd.distill_target(teacher, z, t, s, *substeps)
    check(torch.is_tensor(x_tilde), f"x̃ is no tensor but {type(x_tilde).__name__}")
    largest = x_tilde.abs().max().item()
    check(not largest > 1e6, f"x̃ is {largest:.3g} for t = {t}, s = {s}: what it is divided by is nearly 0; "
          "is a ratio in the denominator upside down?")
    return x_tilde

def landing_errors(pd, dtype, steps, substeps):
    """(by how much the student misses, how far the teacher moves) for all t = 1/N, ..., 1."""
    t = torch.arange(1, steps + 1, dtype=torch.float64) / steps
    z, teacher, s = normal(steps, 4).to(dtype), gaussian(0.3, 0.4), t - 1 / steps
    x_tilde = pd.distill_target(teacher, z, t.to(dtype), s.to(dtype), substeps)
    landing = ref.land(teacher, z.double(), t, s, substeps)
    return (ref.ddim(x_tilde, z, t, s) - landing).norm(dim=1), (landing - z).norm(dim=1)

@graded("distill_target")
def test_x_tilde_is_a_mean_of_what_the_teacher_predicts(pd):
    """x̃ lies between the teacher's predictions on the way; it is the first one if they are all the same, be
    they within [-1, 1] or not"""
    for value, (t, s) in product((0.5, -3.0), ((0.75, 0.25), (1.0, 0.5), (1.0, 0.0), (0.25, 0.0))):
        close(target(pd, always(value), normal(2, 1, 4, 4), t, s), value,
              f"x̃ for a teacher that always says {value:g}, t = {t:g}, s = {s:g}")

@graded("distill_target")
def test_teacher_is_asked_at_the_start_of_each_substep(pd):
    """the teacher is asked once at the start of each of its steps, from t down towards s"""
    for substeps in (2, 3):
        model, calls = recorded(two_points)
        pd.distill_target(model, normal(2, 1, 4, 4), 0.9, 0.3, substeps)
        times = listing(t for _, t in calls)
        check(times == listing(0.9 - 0.6 * i / substeps for i in range(substeps)),
              f"with t = 0.9, s = 0.3 and substeps = {substeps} it is asked at {times or 'no time'}")

@graded("distill_target")
def test_teacher_goes_on_from_where_its_last_step_has_led(pd):
    """each question to the teacher is about the z where its last step has led it"""
    for substeps in (2, 3):
        z, (model, calls) = normal(2, 3), recorded(two_points)
        pd.distill_target(model, z, 0.9, 0.3, substeps)
        check(len(calls) > 1, f"it is asked {len(calls)} times with substeps = {substeps}")
        close(calls[1][0], ref.land(two_points, z, 0.9, 0.9 - 0.6 / substeps, 1),
              f"its second z with substeps = {substeps}")

@graded("distill_target")
def test_one_student_step_lands_where_the_teacher_lands(pd):
    """one DDIM step with x̃ from z_t ends where the teacher's steps end, within 1e-5 of the distance moved"""
    errors = []
    for substeps, steps in product((2, 3, 4, 8), (4, 1, 2, 16, 128)):
        miss, moved = landing_errors(pd, torch.float64, steps, substeps)
        errors.append(((miss / moved).nan_to_num(math.inf).max().item(), steps, substeps))
    worst, steps, substeps = max(errors)
    check(worst < 1e-5, f"with N = {steps} and substeps = {substeps} it misses by {worst:.3g} of it")

@graded("distill_target")
def test_x_tilde_agrees_with_algorithm_2(pd):
    """x̃ is Algorithm 2's for pictures, points and numbers, with one t and s or one for each example"""
    teacher = gaussian(0.3, 0.4)
    clocks = (0.75, 0.25), (torch.tensor([0.25, 0.5, 1.0]).double(), torch.tensor([0.0, 0.25, 0.75]).double())
    for shape, substeps, (t, s) in product(SHAPES, ([2], [], [1], [3]), clocks):
        z = normal(*shape)
        got = for_shape(shape, target, pd, teacher, z, t, s, *substeps)
        close(got, ref.distill_target(teacher, z, t, s, *substeps),
              f"x̃ of shape {shape} with substeps = {listing(substeps) or '2'}")

@graded("distill_target")
def test_x_tilde_keeps_its_digits_in_float32(pd):
    """x̃ keeps its digits in float32, also for a step so short that z_s is almost z_t"""
    z, t = normal(3, 1, 8, 8), torch.tensor([1 / 8192, 0.5, 1.0])
    for step in (1 / 8192, 1 / 16384):
        what = f"x̃ for t = 1/8192, 0.5, 1 and s = t - 1/{1 / step:g}"
        exact = ref.distill_target(two_points, z, t.double(), t.double() - step)
        close(pd.distill_target(two_points, z, t.double(), t.double() - step), exact, what, 1e-3)
        exact = ref.distill_target(two_points, z.float(), t, t - step)
        close(pd.distill_target(two_points, z.float(), t, t - step), exact, "right formula, but digits are "
              f"lost in float32, where almost equal numbers are subtracted: {what}", atol=1e-4)

def watch_training(pd, data, updates, **options):
    """Every (x_target, z, t) that `train` hands to `weighted_loss`, for a model of one parameter."""
    class Toy(torch.nn.Linear):
        def forward(self, z, t):
            return z * self.weight.sum(), z

    def watched(model, x_target, z, t, weighting):
        seen.append([x_target.detach().clone(), z.detach().clone(), t.detach().clone()])
        return model(z, t)[0].flatten(1).mean(1)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pd, "weighted_loss", watched)
        pd.train(Toy(1, 1), data, updates, **options)
    return seen

@graded("train")
def test_student_trains_at_the_times_its_sampler_visits(pd):
    """a student of N steps trains at t = 1/N, 2/N, ..., 1, at all of them and at no others"""
    for steps in (1, 4):
        seen = watch_training(pd, DATA, 20, teacher=two_points, steps=steps, batch_size=32)
        times = listing(torch.cat([t for _, _, t in seen]).unique())
        clocks = listing(i / steps for i in range(1, steps + 1))
        check(times == clocks, f"with N = {steps} its times are {times}")

@graded("train")
def test_student_learns_what_its_teacher_says(pd):
    """a student learns from its teacher alone: one that always says 2 teaches 2, whatever the data are"""
    for x_target, _, _ in watch_training(pd, DATA, 2, teacher=always(2.0), steps=4, batch_size=16):
        close(x_target, 2.0, "the target for data that are all 0.5", 1e-4)

@graded("train")
def test_student_target_is_x_tilde_of_its_own_step(pd):
    """the target at t is the x̃ of the student's step, from t to t - 1/N, with the given substeps"""
    for steps, substeps in ((4, 2), (4, 3), (1, 2)):
        teacher, calls = recorded(gaussian(0.3, 0.4))
        seen = watch_training(pd, DATA, 3, teacher=teacher, steps=steps, substeps=substeps, batch_size=32)
        times = listing(sorted({round(t.item(), 3) for _, ts in calls for t in ts}))
        check(times == listing(round(i / (steps * substeps), 3) for i in range(1, steps * substeps + 1)),
              f"with N = {steps} and substeps = {substeps} the teacher is asked at {times or 'no time'}")
        for x_target, z, t in seen:
            close(x_target, ref.distill_target(teacher, z, t, t - 1 / steps, substeps),
                  f"the target with N = {steps} and substeps = {substeps}", 1e-3, 1e-4)

@graded("train")
def test_student_and_teacher_see_z_made_of_data_and_noise(pd):
    """a student sees z = α_t x + σ_t ε of the data, and for a teacher all is as before: t anywhere in (0, 1],
    and the data as target"""
    for who, options in (("student", {"teacher": two_points, "steps": 4}), ("teacher", {})):
        seen = watch_training(pd, DATA, 30, batch_size=128, **options)
        x_target, z, t = (torch.cat(column).double() for column in zip(*seen))
        a, s, _ = ref.at(z, t)
        eps = (z - 0.5 * a) / s
        for what, got, expected in ("mean", eps.mean(), 0.0), ("deviation", eps.std(), 1.0):
            close(got, expected, f"the {what} of (z - α_t x)/σ_t for a {who}", atol=0.06)
    close(x_target, 0.5, "the target of a teacher for data that are all 0.5")
    share = (t[:, None] > torch.linspace(0.05, 0.95, 10)).double().mean(0)
    close(share, torch.linspace(0.95, 0.05, 10), "the share of a teacher's t above 0.05 to 0.95", atol=0.03)
    check(len(t.unique()) > len(t) / 2, f"a teacher's t repeat themselves: {listing(t.unique())}")

@graded("time_embedding")
def test_time_embedding_is_a_row_of_cosines_and_one_of_sines(pd):
    """it is (B, dim): dim/2 cosines, then the sines of the same angles, which are all 0 at t = 0"""
    for dim in (2, 8, 128):
        got = pd.time_embedding(torch.tensor([0.0, 0.3, 1.0]), dim)
        check(torch.is_tensor(got) and got.shape == (3, dim), f"it is not for 3 examples and dim = {dim}")
        cos, sin = got.chunk(2, 1)
        close(cos**2 + sin**2, 1.0, f"cos² + sin² with dim = {dim}")
        close(sin[0], 0.0, f"sin at t = 0, dim = {dim},", atol=1e-6)

@graded("time_embedding")
def test_time_embedding_has_frequencies_that_fall_by_equal_factors(pd):
    """the angles are 1000 t times frequencies that fall from 1 by equal factors, and would reach 1/10000
    after dim/2"""
    t = torch.tensor([0.001, 0.002, 0.1, 1.0])
    for dim in (2, 8, 128):
        got, expected = pd.time_embedding(t, dim), ref.time_embedding(t, dim)
        for k in sorted({0, dim // 2 - 1, dim // 4}):
            angles = [torch.atan2(e[:2, dim // 2 + k], e[:2, k]).double() for e in (got, expected)]
            close(*angles, f"with dim = {dim}, angle number {k} at t = 0.001 and 0.002", 1e-3)
        close(got, expected, f"the embedding of t = 0.001, 0.002, 0.1, 1 with dim = {dim}", atol=2e-4)

class PointNet(torch.nn.Module):
    """net(z, t) for points in the plane."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(6, 64), torch.nn.SiLU(), torch.nn.Linear(64, 64),
                                          torch.nn.SiLU(), torch.nn.Linear(64, 2))

    def forward(self, z, t):
        angles = t[:, None] * torch.tensor([math.pi / 2, math.pi])
        return self.layers(torch.cat([z, angles.cos(), angles.sin()], 1))

def point_errors(pd):
    """{steps: (how far students of a teacher with 8 steps land from it, and that teacher with so few)}"""
    torch.manual_seed(0)
    angle, z = torch.rand(2000) * 2 * math.pi, normal(1000, 2).float()
    data, teacher, errors = torch.stack([angle.cos(), angle.sin()], 1), pd.Denoiser(PointNet(), "v"), {}
    pd.train(teacher, data, 300, batch_size=256, lr=1e-2, ema=0.98)
    end, model = pd.sample(teacher, z, 8), teacher
    for stage, steps in enumerate((4, 2, 1), 1):
        before, model = model, copy.deepcopy(model)
        pd.train(model, data, 100, teacher=before, steps=steps, batch_size=256, lr=3e-3, stage=stage)
        errors[steps] = [(pd.sample(m, z, steps) - end).square().mean().sqrt().item()
                         for m in (model, teacher)]
    return errors

@graded("outcome")
def test_one_step_student_draws_what_its_teacher_draws_in_eight(pd):
    """trained by this file on points of a ring, the student lands in one step where its teacher of eight
    steps lands, within a quarter of what that teacher misses in one step"""
    student, teacher = point_errors(pd)[1]
    check(student < 0.25 * teacher, f"the student is off by {student:.3g}, the teacher by {teacher:.3g}")

# ---- 3. More mathematics: closed forms, the ends of time, devices and types --------------------------------

def load(source, file="pd.py"):
    """A module made of the text of pd.py, which `import` knows nothing of."""
    module = types.ModuleType("pd")
    module.__file__ = str(file)
    exec(compile(source, str(file), "exec"), vars(module))
    return module

@pytest.fixture(scope="session")
def source():
    return Path(official.__file__).read_text(encoding="utf8")

@pytest.fixture(scope="session")
def module():
    """The module under test."""
    file = os.environ.get("PD_FILE", official.__file__)
    return load(Path(file).read_text(encoding="utf8"), file)

@pytest.fixture
def exercise(request):
    """The exercise that a graded test is about, None in all other tests."""
    return getattr(request, "param", None)

@pytest.fixture
def pd(module, exercise, monkeypatch):
    """The module under test; for a graded test with all but its own exercise taken from the reference."""
    for name, function in given(exercise).items():
        monkeypatch.setattr(module, name, function)
    return module

def given(exercise):
    """What an exercise may build on: the reference's functions for all others, in the types of pd.py."""
    def in_its_type(function):
        def answer(*args, **kwargs):
            dtype = next((a.dtype for a in args if torch.is_tensor(a)), torch.float64)
            result = function(*args, **kwargs)
            return result.to(dtype) if torch.is_tensor(result) else [r.to(dtype) for r in result]
        return answer
    own = "to_x_eps" if exercise in PARAMS else exercise
    if exercise in (None, "outcome"):
        return {}
    names = {"to_x_eps", *EXERCISES} - {*PARAMS, "train", "outcome", own}
    return {name: in_its_type(getattr(ref, name)) for name in sorted(names)}

def test_v_is_the_velocity_on_the_circle(pd):
    """v = dz/dφ where φ is the angle of (α, σ), by a central difference."""
    x, eps = normal(3, 2, seed=1), normal(3, 2, seed=2)
    for t in INNER:
        (a0, s0), (a1, s1) = pd.alpha_sigma(t - 1e-5), pd.alpha_sigma(t + 1e-5)
        v = ((a1 - a0) * x + (s1 - s0) * eps) / (torch.atan2(s1, a1) - torch.atan2(s0, a0))
        for got, expected in zip(pd.to_x_eps(v, ref.noisy(x, eps, t), t, "v"), (x, eps)):
            close(got, expected, f"t = {t}", 1e-6, 1e-7)

def everything(pd, z, param, t, s):
    """The results of all functions of parts 1 to 5 for one z."""
    def net(z, t):
        return 0.5 * (torch.cat([z, z], 1) if param == "both" else z)
    model, (x_hat, eps_hat) = pd.Denoiser(net, param), pd.to_x_eps(net(z, t), z, t, param)
    return [x_hat, eps_hat, *model(z, t), pd.ddim_step(x_hat, eps_hat, s),
            pd.ancestral_step(x_hat, z, t, s), pd.heun_step(model, x_hat, eps_hat, z, t, s),
            pd.distill_target(model, z, t, s), *(pd.weighted_loss(model, z, z, t, w) for w in WEIGHTINGS),
            *(pd.sample(model, z, 3, sampler, clip=True) for sampler in SAMPLERS)]

@pytest.mark.parametrize("param", PARAMS)
def test_a_float_t_leaves_the_type_of_z_alone(pd, param):
    """float32 stays float32 and float64 stays float64 in all functions; α, σ and λ of a float are float64."""
    for dtype in (torch.float32, torch.float64):
        assert {got.dtype for got in everything(pd, normal(2, 2).to(dtype), param, 0.3, 0.2)} == {dtype}
    assert {(a.dtype, a.ndim) for a in (*pd.alpha_sigma(0.3), pd.log_snr(0.3))} == {(torch.float64, 0)}

@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize("param", PARAMS)
def test_all_tensors_stay_on_the_device_of_z(pd, param):
    """A pretended GPU, where an operation on tensors of two devices is an error."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    with FakeTensorMode():
        with torch.device("cuda:0"):
            z, clock = torch.empty(4, 1, 8, 8), torch.empty(4)
            data = torch.empty(4, 1, 8, 8, dtype=torch.uint8)
            net = pd.UNet(1, 8, attention=(2,), dropout=0.5)
        results = [*everything(pd, z, param, 0.5, 0.25), *everything(pd, z, param, clock, clock - 0.25),
                   net(z, clock), *pd.alpha_sigma(clock), pd.log_snr(clock), pd.time_embedding(clock, 8),
                   pd.draw(data, 4, flip=True)]
        assert {got.device.type for got in results} == {"cuda"}
        assert pd.features(net, data.cpu(), "cuda:0").device.type == "cpu"

@pytest.mark.parametrize("param", PARAMS)
def test_bfloat16_stays_inside_the_network(pd, param, monkeypatch):
    """As on a GPU the network computes in bfloat16; x̂, ε̂, loss, x̃ and samples are float32."""
    torch.manual_seed(0)
    denoiser = pd.Denoiser(awake(pd.UNet(1, 8, attention=(2,), outputs=2 if param == "both" else 1)), param)
    z, t = normal(4, 1, 8, 8).float(), torch.tensor([0.25, 0.5, 0.7, 0.75])
    autocast, inside = torch.autocast, set()
    denoiser.net.stem.register_forward_hook(lambda layer, inputs, out: inside.add(out.dtype))

    @torch.no_grad()
    def results():
        return [*denoiser(z, t), pd.weighted_loss(denoiser, z, z, t, "snr+1"), pd.sample(denoiser, z, 2),
                pd.distill_target(denoiser, z, t, t - 0.25), pd.sample(denoiser, z, 2, "heun")]
    exact = results()
    monkeypatch.setattr(torch, "autocast", lambda device, dtype, enabled: autocast(device, dtype))
    rounded = results()
    assert inside == {torch.float32, torch.bfloat16}
    assert {result.dtype for result in rounded} == {torch.float32}
    for one, other in zip(exact[:3], rounded[:3]):
        assert 0 < (one - other).norm() < 0.05 * one.norm()

def awake(net):
    """A network whose last layers are not zero, as after training."""
    for p in net.parameters():
        torch.nn.init.normal_(p, 0.0 if p.ndim > 1 else 0.5, 0.2)
    return net.eval()

def test_denoiser_gives_the_network_a_clock_per_example(pd):
    """net(z, t) gets t as a (B,) tensor of z's type, whatever t is."""
    z = normal(2, 3).float()
    for t in (0.25, torch.tensor(0.25), torch.tensor([0.25, 0.5])):
        net, calls = recorded(lambda z, t: 0.3 * z)
        for got, expected in zip(pd.Denoiser(net, "x")(z, t), ref.to_x_eps(0.3 * z, z, t, "x")):
            close(got, expected, f"t = {t}")
        clock = calls[0][1]
        assert clock.shape == (2,) and clock.dtype == z.dtype and clock[0] == 0.25

def test_what_is_unknown_is_refused_with_what_would_be_right(pd):
    """A ValueError names the bad value and the good ones; the default param is v."""
    assert (pd.PARAMS, tuple(pd.WEIGHTINGS), pd.SAMPLERS) == (PARAMS, WEIGHTINGS, SAMPLERS)
    assert pd.Denoiser(torch.nn.Identity()).param == "v"
    z, calls = normal(2, 3), {
        (lambda: pd.to_x_eps(z, z, 0.5, "velocity")): ("'velocity'", *PARAMS),
        (lambda: pd.Denoiser(torch.nn.Identity(), "velocity")): ("'velocity'", *PARAMS),
        (lambda: pd.loss_weight(0.5, "sum")): ("'sum'", *WEIGHTINGS),
        (lambda: pd.sample(two_points, z, 2, "euler")): ("'euler'", *SAMPLERS),
        (lambda: pd.sample(two_points, z, 0)): ("0", "1"),
        (lambda: pd.distill_target(two_points, z, 1.0, 0.5, 0)): ("0", "1")}
    for call, words in calls.items():
        with pytest.raises(ValueError) as error:
            call()
        assert all(word in str(error.value) for word in words)

@pytest.mark.parametrize("param, weighting", list(product(PARAMS, WEIGHTINGS)))
def test_losses_of_every_param_and_weighting(pd, param, weighting):
    """In continuous time and for N = 1, 4, 8: 1e-5 away from the ends, in float32 too; finite at the ends."""
    clocks = [torch.arange(1, N + 1) / N for N in (1, 4, 8)] + [torch.tensor(TIMES)]
    for t in [torch.rand(64, generator=torch.Generator().manual_seed(0)), *clocks]:
        (x, eps, z), wrong = example(t, len(t), 2, 4), normal(len(t), 2, 4, seed=3)
        wrong = torch.cat([wrong, -wrong], 1) if param == "both" else wrong
        out = ref.exact_output(x, eps, t, param) + wrong
        model = pd.Denoiser(lambda z, t: out.to(z), param)
        expected = ref.weighted_loss(constantly(*ref.to_x_eps(out, z, t, param)), x, z, t, weighting)
        close(pd.weighted_loss(model, x, z, t.double(), weighting), expected, "in float64", 1e-5, 1e-12)
        loss, inner = pd.weighted_loss(model, x.float(), z.float(), t, weighting), (t - 0.5).abs() <= 0.4
        assert loss.shape == t.shape and loss.dtype == torch.float32 and loss.isfinite().all()
        close(loss[inner], expected[inner], "in float32", 1e-5)

def test_default_weighting_teaches_a_one_step_student(pd):
    """All that such a student does is at t = 1, where the SNR is e^-20."""
    assert pd.loss_weight(1.0, "snr") < 1e-8
    for weighting in (pd.Config().weighting, inspect.signature(pd.train).parameters["weighting"].default):
        assert pd.loss_weight(1.0, weighting) >= 1

@pytest.mark.parametrize("substeps", (2, 3, 4, 8))
def test_landing_for_every_number_of_student_steps(pd, substeps):
    """In float64 within 1e-5 of the distance moved; in float32 within 1e-5 outright, some roundings of z."""
    for steps in range(1, 129):
        miss, moved = landing_errors(pd, torch.float64, steps, substeps)
        assert (miss <= 1e-5 * moved).all()
        assert landing_errors(pd, torch.float32, steps, substeps)[0].max() <= 1e-5

def test_only_the_loss_has_a_gradient(pd):
    """Targets and samples are constants, the loss is not."""
    x, z = torch.ones(2, 3, requires_grad=True), normal(2, 3)
    model = constantly(x * 0.5, x * z)
    assert not (pd.distill_target(model, z, 0.5, 0.2).requires_grad or pd.sample(model, z, 2).requires_grad)
    assert pd.weighted_loss(model, z, z, 0.5, "snr").sum().requires_grad

@pytest.mark.parametrize("mean, variance", ((0.0, 1.0), (0.7, 0.1), (-2.0, 4.0)))
def test_gaussian_data_have_a_known_flow(pd, mean, variance):
    """DDIM converges to the exact map at first order, Heun at second."""
    z, model = normal(50, 1), gaussian(mean, variance)
    exact = gaussian_path(z, 1.0, 0.0, mean, variance)
    for sampler, order in ("ddim", 1), ("heun", 2):
        coarse, fine = ((pd.sample(model, z, n, sampler) - exact).abs().max().item() for n in (128, 256))
        assert fine < 0.1 and abs(math.log2(coarse / fine) - order) < 0.25

def test_student_fitted_to_x_tilde_equals_the_two_step_teacher(pd):
    """For Gaussian data x̃ is linear in z, so least squares finds it: one step is two of the teacher."""
    def line(z):
        return torch.cat([z, torch.ones_like(z)], 1)
    teacher, z, fresh, t, s = gaussian(0.7, 0.3), normal(200, 1), normal(50, 1, seed=9), 0.5, 0.25
    weights = torch.linalg.lstsq(line(z), pd.distill_target(teacher, z, t, s)).solution
    x_hat, eps_hat = pd.to_x_eps(line(fresh) @ weights, fresh, t, "x")
    close(pd.ddim_step(x_hat, eps_hat, s), ref.land(teacher, fresh, t, s, 2), "the landing", 1e-9, 1e-9)

def test_two_point_data_are_sampled_at_their_points(pd):
    """x = ±1: every sampler ends at one of them, DDIM at the sign of its noise."""
    z = normal(200, 1)
    for sampler in SAMPLERS:
        close(pd.sample(two_points, z, 64, sampler).abs(), 1.0, f"|x| of {sampler}", atol=1e-3)
    close(pd.sample(two_points, z, 64), z.sign(), "x of ddim", atol=1e-3)

# ---- 4. Classroom kit: hand it out, grade it, hunt the bug -------------------------------------------------
SECONDS = 300                                                   # to grade one file, which takes about ten

def blocks(top, name):
    """The parts of a module's statements that exercise `name` is about: lists of consecutive statements."""
    functions = {node.name: node for node in top if isinstance(node, ast.FunctionDef)}

    def branch(function, wanted):
        """The one branch of an if, in this function, for which wanted(its condition, its text) holds."""
        found = [node.body for node in ast.walk(functions[function]) if isinstance(node, ast.If)
                 and wanted(ast.unparse(node.test), "\n".join(map(ast.unparse, node.body)))]
        assert len(found) == 1, f"{len(found)} places in {function} for exercise {name}"
        return found[0]
    if name in PARAMS:
        return [branch("to_x_eps", lambda condition, _: condition == f"param == {name!r}")]
    if name == "train":
        return [branch("train", lambda _, text: text.startswith("t = ") and "steps" in text),
                branch("train", lambda _, text: "distill_target(" in text)]
    body = functions[name].body[1:]                             # without the docstring
    table = [node for node in top if ast.unparse(node).startswith("WEIGHTINGS = ")]
    return [table, body] if name == "loss_weight" else [body]

def handout(source, names):
    """The text of pd.py with these exercises taken out."""
    lines, top, cuts = source.splitlines(), ast.parse(source).body, []
    for name in names:
        number = list(EXERCISES).index(name) + 1
        for block in blocks(top, name):
            todo = f'raise NotImplementedError("exercise {number}: {EXERCISES[name][0]}")'
            if block[0] in top:
                todo = f"WEIGHTINGS = dict.fromkeys({WEIGHTINGS})  # exercise {number}: functions of the SNR"
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
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        for name, function in given(exercise).items():
            patch.setattr(module, name, function)
        for test in GRADED[exercise]:
            arguments = {"pd": module, "exercise": exercise}
            try:
                test(**{name: arguments[name] for name in inspect.signature(test).parameters})
            except Exception as error:
                found[test.__name__] = explain(test, error)
    return found

class Grading:
    """A pytest plugin: runs the graded tests of these exercises alone, and writes a line of JSON for each."""

    def __init__(self, file, results, seconds, *names):
        self.file, self.results, self.names, self.late, self.line = file, results, names, False, None
        self.timer = threading.Timer(float(seconds), _thread.interrupt_main)
        self.timer.daemon = True

    def trace(self, frame, event, arg):
        """For sys.settrace: keeps the number of the last line of the student's file that was run."""
        if frame.f_code.co_filename != self.file:
            return None
        if event == "line":
            self.line = frame.f_lineno
        return self.trace

    def pytest_collection_modifyitems(self, items):
        graded = [item for item in items if hasattr(item, "callspec") and "exercise" in item.callspec.params]
        items[:] = [item for name in self.names for item in graded
                    if item.callspec.params["exercise"] == name]

    def pytest_runtestloop(self):
        self.timer.start()

    @pytest.hookimpl(wrapper=True)
    def pytest_pyfunc_call(self):
        self.line = None
        if self.late:
            raise Wrong("not reached before the time was up")
        sys.settrace(self.trace)
        try:
            return (yield)
        except KeyboardInterrupt:
            self.late = True
            raise Wrong("it still runs when the time is up: an endless loop?") from None
        finally:
            sys.settrace(None)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        if call.when == "call" or call.excinfo:
            exercise, failure = item.callspec.params["exercise"], None
            if call.excinfo:
                failure = explain(item.function, call.excinfo.value)
                if self.line and not (exercise == "train" and call.excinfo.errisinstance(Wrong)):
                    code = Path(self.file).read_text(encoding="utf8").splitlines()[self.line - 1].strip()
                    failure += f" (last line of yours: {self.line}: {code})"
            row = {"exercise": exercise, "test": item.function.__name__, "failure": failure,
                   "printed": report.capstdout}
            with open(self.results, "a", encoding="utf8") as out:
                out.write(json.dumps(row) + "\n")
        return report

def grade_here(file, *args):
    """Run the graded tests on a file, in this process."""
    os.environ["PD_FILE"] = file
    torch.set_num_threads(1)
    options = ["--rootdir", str(HERE), "-p", "no:cacheprovider", "-p", "no:terminal"]
    pytest.main([__file__, *options], [Grading(file, *args)])

def in_a_process(function, *args):
    """The command line that calls a function of this file."""
    path = f"import sys; sys.path.insert(0, {str(HERE)!r}); import test_pd; "
    return [sys.executable, "-c", f"{path}test_pd.{function}(*sys.argv[1:])", *map(str, args)]

def grade(file, names):
    """[{"exercise", "test", "failure", "printed"}]: the graded tests of a file, run in a process."""
    rows, why = [], "the program ends, by an exit or a crash"
    with tempfile.TemporaryDirectory() as folder:
        results, file = Path(folder, "results"), Path(file).resolve()
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(in_a_process("grade_here", file, results, SECONDS, *names), cwd=folder,
                           timeout=SECONDS + 120, stdout=subprocess.DEVNULL,
                           env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "MPLBACKEND": "Agg"})
        if results.exists():
            rows = [json.loads(line) for line in results.read_text(encoding="utf8").splitlines()]
    reached = {(row["exercise"], row["test"]) for row in rows}
    missing = {(name, test.__name__) for name in names for test in GRADED[name]} - reached
    return rows + [{"exercise": name, "test": test, "failure": why, "printed": ""} for name, test in missing]

def report(file, rows):
    """The table of one file."""
    lines = [str(file)]
    for number, name in enumerate(EXERCISES, 1):
        tests = [row for row in rows if row["exercise"] == name]
        passed = [row["test"].removeprefix("test_").replace("_", " ") for row in tests if not row["failure"]]
        if tests:
            head = f"{number:2}  {name:16}{len(passed)}/{len(tests)}    "
            lines += textwrap.wrap(head + "; ".join(passed), 110, subsequent_indent=" " * 27)
        for failure in dict.fromkeys(row["failure"] for row in tests if row["failure"]):
            lines += textwrap.wrap(failure, 110, initial_indent="      - ", subsequent_indent="        ")
        printed = "".join(row["printed"] for row in tests).splitlines()
        lines += [f"      prints: {line}" for line in printed[:20]]
    return "\n".join([*lines, f"    {'points':16}{sum(not row['failure'] for row in rows)}/{len(rows)}"])

def grade_files(files, hint, json_file):
    """The command `grade`."""
    everything = []
    for file in files:
        rows = grade(file, (hint,) if hint else tuple(EXERCISES))
        points = sum(not row["failure"] for row in rows)
        everything.append({"file": str(file), "points": points, "of": len(rows), "tests": rows})
        print(report(file, rows), flush=True)
    if hint:
        print(textwrap.fill(f"hint: {EXERCISES[hint][1]}", 110))
    if json_file:
        Path(json_file).write_text(json.dumps(everything, indent=1, ensure_ascii=False), encoding="utf8")

# `old` in pd.py becomes `new`; `where`, an exercise or a test, fails with `clue` in its message. One with a
# symptom, measured right against wrong on points of a ring (`point_errors`) or as it says, is for the hunt.
Mistake = collections.namedtuple("Mistake", "where old new clue symptom answer", defaults=("", "", ""))
ALPHA, ALPHA_T = "torch.sin(FIRST_ANGLE + span * (1 - t))", "torch.cos(FIRST_ANGLE + span * t)"
ALPHAS = ALPHA + ", torch.sin(FIRST_ANGLE + span * t)"
LOG_SNR, SNR, MEAN = "2 * torch.log(alpha / sigma)", "(torch.exp(log_snr(t)))", ".reshape(len(z), -1).mean(1)"
V, EPS = "alpha * z - sigma * out, sigma * z + alpha * out", "(z - sigma * out) / alpha, out"
X, DDIM = "out, (z - alpha * out) / sigma", "alpha * x_hat + sigma * eps_hat"
STD, CLAMP = "sigma_s**(1 - noise_scale) * sigma_t**noise_scale", "        x_hat = x_hat.clamp(-1, 1)\n"
PREDICT, ASK = "model(ddim_step(x_hat, eps_hat, s), s)", "        x_hat, eps_hat = teacher(z, start)\n"
CLIP = 'to_x_eps(x_hat.clamp(-1, 1), z, t, "x") if clip else (x_hat, eps_hat)'
CLOCK, TARGET = "torch.ceil(t * steps) / steps", "distill_target(teacher, z, t, t - 1 / steps,"
X_TILDE = "x_tilde / (alpha_over_sigma(s) - alpha_over_sigma(t))"
ZEROS = "    x_tilde = torch.zeros_like(z)\n"
QUOTIENT = """    first = z                                   # Algorithm 2 as the paper prints it
    for i in range(substeps):
        start, end = (t + (s - t) * k / substeps for k in (i, i + 1))
        z = ddim_step(*teacher(z, start), end)
    (a_t, s_t), (a_s, s_s) = alpha_sigma_for(z, t), alpha_sigma_for(z, s)
    return (z - s_s / s_t * first) / (a_s - s_s / s_t * a_t)
"""
MISTAKES = [
    Mistake("distill_target", X_TILDE, "x_hat", "it misses by",
            "Losses look fine; students of 4 and 2 steps are off by 0.028 and 0.059, not 0.006 and 0.020.",
            "The teacher's second prediction is taken for x̃; a DDIM step with it misses the landing."),
    Mistake("distill_target", "(t * (substeps - i) + s * i)", "(t * i + s * (substeps - i))",
            "is asked at 0.3, 0.6",
            "Students are far worse than their teacher in as few steps: off by 0.67 (4 steps), not 0.006.",
            "The teacher's times are exchanged: it walks from s up to t, not from t over t' down to t''."),
    Mistake("test_default_weighting_teaches_a_one_step_student", 'substeps=2, weighting="truncated"',
            'substeps=2, weighting="snr"', "",
            "Its loss falls to 6e-10, yet the one-step student is off by 0.61, not 0.05.",
            "The x-error is weighted with the SNR: e^-20 at t = 1, where a one-step student works."),
    Mistake("distill_target", ASK, ASK + CLAMP, "within [-1, 1] or not",
            "The loss of a student of 4 steps is 2e-3, not 6e-5, and it is off by 0.034, not 0.006.",
            "The teacher is clipped inside the target, a path it does not take. x̃ may lie outside [-1, 1]."),
    Mistake("distill_target", "return alpha / sigma\n", "return sigma / alpha\n", "it misses by",
            "The one-step student's loss is 4e-7, and it is as bad as the teacher in one step: 0.64, both.",
            "The wrong ratio: z/σ moves along α/σ with slope x̂, not along σ/α."),
    Mistake("train", CLOCK, "torch.floor(t * steps) / steps", "with N = 1 its times are 0",
            "The student of 4 steps is off by 0.012, not 0.006, and the one of 1 step by 0.39, not 0.05.",
            "The clock is off by one: 0, ..., 1 - 1/N. It never sees t = 1, where its sampler starts."),
    Mistake("test_training_clips_gradients_averages_weights_and_logs_means", "p.copy_(a)", "a.copy_(p)", "",
            "The student of 4 steps is off by 0.0083, not 0.0064: somewhat worse, and never the same.",
            "The average is kept and forgotten: the weights are copied into it, not it into the weights."),
    Mistake("sample", "for i in range(steps, 0, -1):", "for i in range(steps, 1, -1):", "asks at no time",
            "Of ±1, DDIM's 8 steps miss by 0.21 on average, not 0.004; in one step nothing happens at all.",
            "The sampler is one step short: it ends at t = 1/N, not at 0."),
    Mistake("loss_weight", SNR, "((1 - torch.as_tensor(t)) / t)", "loss at t = 0.1",
            "The teacher's loss is 0.38 where others have 0.57; the network cares less for details.",
            "The weights are made of t: (1 - t)/t is taken for α²/σ². Near the data the SNR is far larger."),
    Mistake("train", CLOCK, "t.clamp(min=1 / steps)", "at no others",
            "A student of 4 steps has a loss of 9e-5, not 6e-5: it needs more updates than it should.",
            "The student's clock is continuous; what it learns between 1/N, ..., 1 is wasted."),
    Mistake("train", "x = distill_target(", "_ = distill_target(", "all 0.5 is 0.5, not 2",
            "Students' losses stay at 0.5, and in one step they are as bad as the teacher: 0.63 and 0.64.",
            "x̃ is computed and not used: the student learns the data, whose mean given z is a blur."),
    Mistake("sample", CLIP, "(x_hat.clamp(-1, 1) if clip else x_hat), eps_hat", "ε̂ fits the clipped x̂",
            "Nothing changes, unless samples are clipped while x̂ leaves [-1, 1]: then z is off its path.",
            "x̂ is clipped and ε̂ stays as it was, so the two do not add up to z any more."),
    Mistake("ancestral_step", STD, "sigma_t**(1 - noise_scale) * sigma_s**noise_scale", "if noise_scale is 1",
            "Of ±1, 8 ancestral steps miss by 0.0023 with noise_scale 1, 0.0053 with 0, not 0.0034, 0.0031.",
            "The bounds of the variance are exchanged: σ_s makes the lower one (0), σ_t the upper one (1)."),
    Mistake("sample", '"ddim" or s == 0', '"ddim"', "adds no noise",
            "Of ±1, 8 ancestral steps miss by 0.16 on average, not 0.003; DDIM's are as good as ever.",
            "The last step is not DDIM's: noise is added that nothing removes, and Heun asks at t = 0."),
    Mistake("alpha_sigma", ALPHA, ALPHA_T, "keep their digits in float32",
            "No sample shows it, but α at t = 1 is 4.5375e-05 in float32, not 4.53999e-05.",
            "A float32 knows an angle near π/2 to 1e-7; the sine of the complement has all of α's digits."),
    Mistake("time_embedding", "1000 * t[:, None]", "t[:, None]", "1000 t",
            "All runs, but the 128 numbers of t = 0.4 and t = 0.6 differ by 0.4 in all, not by 9.4.",
            "The factor of 1000 is missing: the fastest cosine turns by one radian, others hardly at all."),
    Mistake("weighted_loss", MEAN, ".mean()", "has nothing to do with the others",
            "The teacher's loss is 6000, give or take 28000 between updates, not 0.57, give or take 0.03.",
            "The mean goes over the batch, too: large weights near t = 0 meet the large errors of large t."),
    Mistake("train", TARGET, TARGET.replace("1 / steps", "0.5 / steps"), "the teacher is asked at",
            "Losses are small, yet students of 4 and 1 steps are off by 0.044 and 0.38, not 0.006 and 0.05.",
            "x̃ is made for a step of 1/(2N), the teacher's, but the student of N steps goes 1/N at once."),
    Mistake("test_dropout_acts_for_the_teacher_and_not_for_students", "model.train(teacher is None)",
            "model.train()", "",
            "On digits with dropout 0.3, a student of 4 steps has a loss of 0.0057, not 0.0010.",
            "Dropout stays on while students learn. They copy a map without chance: noise can only blur it."),
    Mistake("test_pictures_become_numbers_from_minus_1_to_1", "x.float() / 127.5 - 1", "x.float() / 255", "",
            "The darkest pixel that a picture can get is 128, not 0: all are pale.",
            "The data run from 0 to 1, but noise and all that makes pictures of samples expect -1 to 1."),
    # Wrong answers that are too plain for a hunt
    Mistake("alpha_sigma", ALPHAS, "(t * math.pi / 2).cos(), (t * math.pi / 2).sin()", "inf, not 20"),
    Mistake("alpha_sigma", ALPHAS, "torch.sin(FIRST_ANGLE + span * t), " + ALPHA, "t = 0 is -20, not 20"),
    Mistake("log_snr", LOG_SNR, "torch.log(alpha / sigma)", "λ_t at t = 0 is 10, not 20"),
    Mistake("log_snr", LOG_SNR, "2 * torch.log(sigma / alpha)", "λ_t at t = 0 is -20, not 20"),
    Mistake("log_snr", LOG_SNR, "(alpha / sigma)**2", "λ_t at t = 0.5 is 1, not 0"),
    Mistake("v", V, "sigma * z - alpha * out, alpha * z + sigma * out", "at t = 0 z is the data"),
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
    Mistake("loss_weight", "snr.clamp(min=1)", "snr.clamp(max=1)", "w at t = 1 is 2.0612e-09, not 1"),
    Mistake("loss_weight", SNR, "(log_snr(t))", '||ε - ε̂||² with "snr"'),
    Mistake("weighted_loss", MEAN, ".reshape(len(z), -1).sum(1)", "the mean over its pixels"),
    Mistake("weighted_loss", "loss_weight(t, weighting) * (x_target", "(x_target", "w(λ_t) times"),
    Mistake("weighted_loss", MEAN, ".mean((1, 2, 3))", "data of shape (3, 2)"),
    Mistake("ddim_step", DDIM, "sigma * x_hat + alpha * eps_hat", "made of the same x and ε"),
    Mistake("ddim_step", DDIM, "alpha * x_hat + sigma * torch.randn_like(x_hat)", "made of the same x and ε"),
    Mistake("ddim_step", DDIM, "alpha * x_hat + (1 - alpha) * eps_hat", "z_s at s = 0.1"),
    Mistake("ancestral_step", "(1 - ratio).sqrt()", "(1 - ratio)", "the deviation with noise_scale = 1"),
    Mistake("ancestral_step", STD, "(sigma_s + noise_scale * (sigma_t - sigma_s))", "is half way"),
    Mistake("heun_step", PREDICT, PREDICT[:-2] + "t)", "the time is 1.0 for t = 1 and s = 0.5"),
    Mistake("heun_step", PREDICT, "model(z, s)", "the z that it gets"),
    Mistake("heun_step", "(eps_hat + eps_end) / 2", "(eps_hat + eps_end)", "with the same x̂ and ε̂"),
    Mistake("distill_target", "        z = ddim_step(x_hat, eps_hat, end)\n", "", "its last step has led it"),
    Mistake("distill_target", ZEROS, QUOTIENT, "right formula, but digits are lost in float32"),
    Mistake("distill_target", ZEROS, QUOTIENT.replace("s_s / s_t", "s_t / s_s"), "is nearly 0; is a ratio"),
    Mistake("time_embedding", "[angles.cos(), angles.sin()]", "[angles.sin(), angles.cos()]", "sin at t = 0"),
    Mistake("time_embedding", "device=t.device) / (dim // 2)", "device=t.device) / dim", "reach 1/10000"),
]
HUNTS = [mistake for mistake in MISTAKES if mistake.symptom]

NAMES = list(EXERCISES)[:-1]                                    # of what can be handed out

def plant(source, mistake):
    """The text of pd.py with a mistake in it."""
    assert source.count(mistake.old) == 1, f"{source.count(mistake.old)} times in pd.py: {mistake.old}"
    return source.replace(mistake.old, mistake.new)

def hunt(number, file, answer):
    """The command `hunt`."""
    mistake = HUNTS[number - 1]
    if file:
        write_new(file, plant(Path(official.__file__).read_text(encoding="utf8"), mistake))
    print(textwrap.fill(f"Mistake {number}. {mistake.symptom}", 110))
    if answer:
        tests = [test.__name__ for test in GRADED.get(mistake.where, ())] or [mistake.where]
        print(textwrap.fill(mistake.answer, 110), f"- {mistake.old.strip()}", f"+ {mistake.new.strip()}",
              f"It is caught by {' or '.join(tests)}.", sep="\n")

def write_new(file, text):
    with open(file, "x", encoding="utf8") as out:               # never over somebody's work
        out.write(text)

# ---- 5. Tests of the kit -----------------------------------------------------------------------------------

@pytest.mark.parametrize("mistake", MISTAKES, ids=[f"{m.where}-{n}" for n, m in enumerate(MISTAKES, 1)])
def test_every_mistake_is_caught_with_a_message_that_leads_to_it(source, mistake):
    """A wrong answer fails its exercise with the clue in a message; another mistake fails its test."""
    module = load(plant(source, mistake))
    if mistake.where in EXERCISES:
        messages = failures(module, mistake.where).values()
        assert any(mistake.clue in message for message in messages), list(messages)
    else:
        with pytest.raises(AssertionError):
            globals()[mistake.where](module)

def test_one_solution_turns_one_exercise_green(source):
    """All exercises but one are taken out, or all: these say so, and the one that is there has full marks."""
    for solved in [None, *NAMES]:
        module = load(handout(source, [name for name in NAMES if name != solved]))
        for number, name in enumerate(NAMES, 1):
            expected = f"not filled in yet: exercise {number}: {EXERCISES[name][0]}"
            found = failures(module, name)
            assert found == {test.__name__: expected for test in GRADED[name] if name != solved}
            assert len([mistake for mistake in MISTAKES if mistake.where == name]) >= 3

def test_grade_says_where_a_file_goes_wrong(source, tmp_path, capsys, monkeypatch):
    """Prints are shown, messages hold the student's last line, an endless loop ends, a hint is given."""
    file, grades = tmp_path / "mine.py", tmp_path / "grades.json"
    line, loop = f"return {DDIM} + nonsense", "while True: pass"
    text = handout(source, ["log_snr"]).replace(f"return {DDIM}", f'print("here I am")\n    {line}')
    file.write_text(text, encoding="utf8")
    main(["grade", str(file), "--json", str(grades)])
    (result,) = json.loads(grades.read_text(encoding="utf8"))
    printed = " ".join(capsys.readouterr().out.split())
    number = [other.strip() for other in text.splitlines()].index(line) + 1
    assert "prints: here I am" in printed and "not filled in yet: exercise 2: λ_t" in printed
    assert f"NameError: name 'nonsense' is not defined (last line of yours: {number}: {line})" in printed
    wrong = {row["exercise"] for row in result["tests"] if row["failure"]}
    assert wrong == {"log_snr", "ddim_step", "outcome"}
    assert result["of"] == sum(map(len, GRADED.values())) and f"{result['points']}/{result['of']}" in printed
    file.write_text(source.replace("    freqs = ", f"    {loop}\n    freqs = "), encoding="utf8")
    monkeypatch.setattr(sys.modules[main.__module__], "SECONDS", 15)
    main(["grade", str(file), "--hint", "time_embedding"])
    printed = " ".join(capsys.readouterr().out.split())
    assert f"hint: {EXERCISES['time_embedding'][1]}" in printed and "0/2" in printed
    assert "an endless loop? (last line of yours: " in printed and f"{loop})" in printed

def test_commands_write_what_they_say_and_never_over_a_file(source, tmp_path, capsys):
    """handout and hunt; nonsense is refused."""
    handed, hunted, none = (str(tmp_path / name) for name in "abc")
    main(["handout", handed, "--only", "v", "heun_step"])
    assert Path(handed).read_text(encoding="utf8").count("raise NotImplementedError") == 2
    main(["hunt", "9", hunted])
    assert Path(hunted).read_text(encoding="utf8") == plant(source, HUNTS[8])
    assert HUNTS[8].answer[:40] not in capsys.readouterr().out
    main(["hunt", "9", "--answer"])
    assert HUNTS[8].answer[:40] in capsys.readouterr().out
    for bad in (["handout", handed], ["grade", none], ["hunt", "99"], ["handout", none, "--only", "y"]):
        with pytest.raises(SystemExit, match="2"):
            main(bad)

def test_handout_needs_neither_notebook_nor_unix(source, tmp_path):
    """pd.py and test_pd.py are enough, also where modules of Unix are missing."""
    for file in (official.__file__, __file__):
        shutil.copy(file, tmp_path)
    missing = "import sys; sys.modules.update(resource=None, fcntl=None, scipy=None); import test_pd; "
    line = [sys.executable, "-c", missing + "test_pd.main(['handout', 'mine.py'])"]
    subprocess.run(line, cwd=tmp_path, check=True, timeout=300)
    assert (tmp_path / "mine.py").read_text(encoding="utf8") == handout(source, NAMES)

# ---- 6. Network, data, evaluation --------------------------------------------------------------------------

@pytest.mark.parametrize("channels, H, W, mults, patch", [
    (1, 8, 8, (1, 2), 1), (3, 28, 28, (1, 2, 2), 2), (1, 25, 25, (1, 2, 2), 1), (2, 7, 10, (1,), 4)])
def test_unet_takes_any_channels_any_size_and_any_patch(pd, channels, H, W, mults, patch):
    """Its output is as large as its input, 0 at first; t matters, and the neighbours in the batch do not."""
    net = pd.UNet(channels, 8, mults, attention=(1, 2), patch=patch, outputs=2)
    z, t = torch.randn(3, channels, H, W), torch.tensor([0.1, 0.5, 0.9])
    assert net(z, t).abs().max() == 0
    with torch.no_grad():
        out = awake(net)(z, t)
        assert out.shape == (3, 2 * channels, H, W)
        assert not torch.allclose(out[:1], net(z[:1], t[1:2]), atol=1e-3)
        assert torch.allclose(out[1:2], net(z[1:2], t[1:2]), atol=1e-4, rtol=1e-4)
        multiple = patch * 2 ** (len(mults) - 1)
        padded = torch.nn.functional.pad(z, (0, -W % multiple, 0, -H % multiple))
        assert torch.allclose(out, net(padded, t)[..., :H, :W], atol=1e-4)
        net.middle2.forward = lambda h, emb: 0 * h              # what is left goes through skip connections
        assert not torch.allclose(net(z, t), net(0 * z, t), atol=1e-3)

def test_patch_is_space_to_depth(pd):
    """A network of patch 2 is one of patch 1 on four times the channels at a quarter of the pixels."""
    def depth(z):
        B, C, H, W = z.shape
        blocks = z.reshape(B, C, H // 2, 2, W // 2, 2)
        return blocks.permute(0, 1, 3, 5, 2, 4).reshape(B, 4 * C, H // 2, W // 2)
    patched, plain = awake(pd.UNet(1, 8, patch=2)), pd.UNet(4, 8)
    z, t = torch.randn(2, 1, 8, 12), torch.rand(2)
    plain.load_state_dict(patched.state_dict())
    assert torch.allclose(depth(patched(z, t)), plain.eval()(depth(z), t), atol=1e-5)

def test_presets_are_networks_of_their_size_and_the_papers_numbers(pd):
    """The digits' network is small, the large one as announced, and "paper" is the authors' setting."""
    for preset, channels, low, high in (("digits", 1, 1e5, 1e6), ("large", 3, 30e6, 40e6)):
        config = pd.Config(**pd.PRESETS[preset] | {"shape": (9, channels, 32, 32)})
        assert low < numbers(pd.build(config, "cpu")).numel() < high
    paper = pd.Config(**pd.PRESETS["paper"])
    facts = dict(width=256, mults=(1, 1, 1), blocks=3, dropout=0.2, param="x", weighting="truncated", lr=2e-4,
                 ema=0.9999, warmup=1000, batch_size=128, student_lr=5e-5, student_updates=50_000, stages=13,
                 substeps=2, final_steps=1, patch=1, flip=True, early_share=1)
    assert {key: getattr(paper, key) for key in facts} == facts
    assert not any(pd.Config(**pd.PRESETS[name]).flip for name in ("digits", "grey", "grey-cpu"))

def save_pictures(folder, arrays, suffix="png"):
    folder.mkdir(parents=True, exist_ok=True)
    for i, array in enumerate(arrays):
        Image.fromarray(np.asarray(array, np.uint8)).save(folder / f"{i:02}.{suffix}")

def test_digits_are_the_real_ones_in_uint8_and_need_no_torchvision(pd, monkeypatch):
    """1,797 grey pictures of 8x8, rounded from 17 levels; other data say what is missing."""
    from sklearn.datasets import load_digits
    monkeypatch.setitem(sys.modules, "torchvision", None)
    (images, labels), digits = pd.load_dataset("digits"), load_digits()
    assert images.dtype == torch.uint8 and images.shape == (1797, 1, 8, 8)
    assert labels.tolist() == digits.target.tolist()
    assert np.abs(images[:, 0].numpy() / 255 - digits.images / 16).max() < 0.5 / 255 + 1e-9
    with pytest.raises(ValueError, match="mnist could not be loaded"):
        pd.load_dataset("mnist", "nowhere")

def test_folder_flat_or_a_subfolder_a_class_grey_or_colour_resized_or_not(pd, tmp_path):
    """Every pixel arrives; one picture in colour makes all RGB; a size takes the centre."""
    rng, wide = np.random.default_rng(0), np.zeros((8, 16))
    grey, colour = rng.integers(0, 256, (3, 6, 9)), rng.integers(0, 256, (2, 6, 9, 3))
    wide[:, 4:12] = 200                                         # a bright square in the middle
    folders = {"flat": grey, "classes/a": grey, "classes/b": colour, "wide": [wide, wide.T]}
    for name, arrays in folders.items():
        save_pictures(tmp_path / name, arrays)
    images, labels = pd.load_dataset(str(tmp_path / "flat"))
    assert images.shape == (3, 1, 6, 9) and (images[:, 0].numpy() == grey).all() and not labels.any()
    images, labels = pd.load_dataset(str(tmp_path / "classes"))
    assert images.shape == (5, 3, 6, 9) and labels.tolist() == [0, 0, 0, 1, 1]
    assert (images[3:].permute(0, 2, 3, 1).numpy() == colour).all() and (images[0].numpy() == grey[0]).all()
    images, _ = pd.load_dataset(str(tmp_path / "wide"), size=4)
    assert images.shape == (2, 1, 4, 4) and images[..., 1:-1].float().mean() > 190

def test_mnist_and_cifar10_are_read_from_torchvisions_files(pd, tmp_path, monkeypatch):
    """From tiny files in torchvision's own formats, with their labels."""
    datasets = pytest.importorskip("torchvision").datasets
    rng, labels = np.random.default_rng(0), np.array([3, 1, 2, 0], np.uint8)
    grey, colour = rng.integers(0, 256, (4, 28, 28), np.uint8), rng.integers(0, 256, (4, 3, 32, 32), np.uint8)
    raw, batches = tmp_path / "MNIST" / "raw", tmp_path / "cifar-10-batches-py"
    raw.mkdir(parents=True)
    batches.mkdir()
    files = ("images-idx3", grey), ("labels-idx1", labels)
    for split, (name, content) in product(("train", "t10k"), files):
        head = bytes([0, 0, 8, content.ndim]) + np.array(content.shape, ">i4").tobytes()
        (raw / f"{split}-{name}-ubyte").write_bytes(head + content.tobytes())
    (batches / "data").write_bytes(pickle.dumps({"data": colour.reshape(4, -1), "labels": labels.tolist()}))
    (batches / "meta").write_bytes(pickle.dumps({"label_names": list("abcd")}))
    for name, value in (("train_list", [["data", None]]), ("test_list", []),
                        ("meta", {"filename": "meta", "key": "label_names", "md5": None})):
        monkeypatch.setattr(datasets.CIFAR10, name, value)
    for name, pixels in (("mnist", grey[:, None]), ("cifar10", colour)):
        images, found = pd.load_dataset(name, tmp_path)
        assert (images.numpy() == pixels).all() and found.tolist() == labels.tolist()

def test_pictures_become_numbers_from_minus_1_to_1(pd):
    """Black is -1, white is 1, and all between are on the line; on the way back all above white is white."""
    data = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    close(pd.draw(data, 2, flip=False)[0].flatten(), torch.linspace(-1, 1, 256), "the pixels", atol=1e-6)
    for value, pixel in ((-7.0, 0), (-1.0, 0), (0.002, 128), (1.0, 255), (7.0, 255)):
        assert (pd.generate(always(value), 2, (1, 2, 2), 1) == pixel).all(), value

def test_flips_mirror_half_of_the_pictures_and_only_where_asked(pd):
    """Left becomes right, nothing else."""
    data = torch.arange(16, dtype=torch.uint8).reshape(1, 1, 4, 4)
    pd.set_seed(0)
    x, plain = pd.draw(data, 1000, flip=True), data.float() / 127.5 - 1
    mirrored = (x == plain.flip(-1)).flatten(1).all(1)
    assert 400 < mirrored.sum() < 600 and ((x == plain).flatten(1).all(1) | mirrored).all()
    assert (pd.draw(data, 100, flip=False) == plain).all()

def test_frechet_distance_of_gaussians_has_its_closed_form(pd):
    """As scipy has it; a shift by 2 in 3 dimensions is 12; 3 a against a is (3 - 1)² tr C; flat data work."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(500, 3)) @ rng.normal(size=(3, 3)), rng.normal(size=(400, 3)) + [1, 2, 3]
    a -= a.mean(0)
    flat = np.hstack([a, np.zeros((500, 2))])
    for one, other, distance in ((a, b, ref.frechet_distance(a, b)), (a, a + 2, 12), (flat, flat, 0),
                                 (3 * a, a, 4 * np.trace(np.cov(a.T)))):
        assert pd.frechet_distance(one, other) == pytest.approx(distance, rel=1e-9, abs=1e-9)

def test_generate_gives_every_model_the_same_noise_and_the_same_first_pictures(pd, monkeypatch):
    """Normal noise, other noise for another seed; sampler, steps and clip reach `sample`."""
    monkeypatch.setattr(pd, "CHUNK", 4)
    model, seen = recorded(says(lambda z, a, s: 3 * z))
    ten, three = (pd.generate(model, num, (1, 2, 2), 1, seed=5) for num in (10, 3))
    noise = torch.cat([z for z, _ in seen[:3]])
    assert ten.dtype == torch.uint8 and ten.shape == (10, 1, 2, 2) and (ten[:3] == three).all()
    assert len(noise.unique()) == 40 and abs(noise.mean()) < 0.5 and 0.6 < noise.std() < 1.4
    assert (pd.generate(model, 10, (1, 2, 2), 1, seed=6) != ten).any()
    for sampler, clip in (("ddim", False), ("heun", False), ("ddim", True)):
        expected = pd.sample(model, noise[:3], 3, sampler, clip)
        assert (pd.generate(model, 3, (1, 2, 2), 3, sampler, 5, clip=clip) == pixels(expected)).all()

def test_tile_puts_pictures_in_rows(pd):
    """Row by row, and black where there is none."""
    images = torch.arange(3, dtype=torch.uint8).reshape(3, 1, 1, 1).expand(3, 3, 2, 4) + 1
    grid = pd.tile(images, 2)
    assert grid.shape == (4, 8, 3) and grid[::2, ::4, 0].tolist() == [[1, 2], [3, 0]]

# ---- 7. The ladder: one real run, watched at train, at Adam and at the samplers ----------------------------

def numbers(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()

def pixels(x):
    return ((x.clamp(-1, 1) + 1) * 127.5).round()

@contextlib.contextmanager
def watching(pd):
    """Notes what a run does: .stages, one for each call of train, and .samples, one for each of sample."""
    seen = types.SimpleNamespace(stages=[], samples=[])

    def train(original, model, data, updates, **options):
        stage = types.SimpleNamespace(start=numbers(model), lr=[], norms=[], weights=[], calls=[], targets=[],
                                      random=[])
        seen.stages.append(stage)
        stage.log, stage.options = original(model, data, updates, **options), options
        stage.end = numbers(model)
        return stage.log

    def weighted_loss(original, model, x_target, z, t, weighting):
        with torch.random.fork_rng(), torch.no_grad():
            seen.stages[-1].random.append(bool((model(z, t)[0] != model(z, t)[0]).any()))
        loss = original(model, x_target, z, t, weighting)
        seen.stages[-1].calls.append((x_target.clone(), t.clone(), weighting, loss.mean().item()))
        return loss

    def distill_target(original, teacher, z, t, s, substeps=2):
        seen.stages[-1].targets.append((numbers(teacher), substeps))
        return original(teacher, z, t, s, substeps)

    def step(original, optimizer, *args, **kwargs):
        stage, (group,) = seen.stages[-1], optimizer.param_groups
        stage.lr.append(group["lr"])
        stage.norms.append(torch.cat([p.grad.flatten() for p in group["params"]]).norm().item())
        result = original(optimizer, *args, **kwargs)
        stage.weights.append(torch.cat([p.detach().flatten() for p in group["params"]]).clone())
        return result

    def sample(original, model, z, steps, sampler="ddim", clip=False, noise_scale=1.0):
        x = original(model, z, steps, sampler, clip, noise_scale)
        how = steps, sampler, bool(clip), noise_scale
        seen.samples.append(types.SimpleNamespace(model=numbers(model), z=z, x=x, how=how))
        return x
    with pytest.MonkeyPatch.context() as patch:
        for function in (train, weighted_loss, distill_target, sample):
            original = getattr(pd, function.__name__)
            patch.setattr(pd, function.__name__, functools.partial(function, original))
        original_step = torch.optim.Adam.step
        patch.setattr(torch.optim.Adam, "step", lambda *args, **kwargs: step(original_step, *args, **kwargs))
        yield seen

def command(pd, *args):
    """The exit status of pd.py, in this process."""
    try:
        pd.main([str(arg) for arg in args])
        return 0
    except SystemExit as stop:
        return stop.code

TINY = ("--preset digits --width 8 --teacher-updates 12 --student-updates 6 --stages 2 --batch-size 8 "
        "--eval-samples 30 --device cpu --no-compile").split()

@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder of 24 pictures of 8x6, each with a value of its own in its corner."""
    folder = tmp_path_factory.mktemp("data") / "pictures"
    arrays = np.random.default_rng(0).integers(0, 256, (24, 8, 6))
    arrays[:, 0, 0] = 10 * np.arange(24)
    save_pictures(folder, arrays)
    return folder

@pytest.fixture(scope="session")
def ladder(module, pictures, tmp_path_factory):
    """A watched run: teacher of 4 steps, students of 2 and 1."""
    out, names = tmp_path_factory.mktemp("runs") / "ladder", {4: "teacher", 2: "student-2", 1: "student-1"}
    with watching(module) as seen, contextlib.redirect_stdout(io.StringIO()) as printed:
        assert command(module, *TINY, "--dataset", pictures, "--out", out, "--teacher-updates", 40) == 0
    seen.out, seen.printed = out, printed.getvalue()
    seen.files = {steps: torch.load(out / f"{name}.pt", weights_only=True) for steps, name in names.items()}
    seen.models = {steps: module.load_model(out / f"{name}.pt")[0] for steps, name in names.items()}
    seen.rows = json.loads((out / "results.json").read_text())["rows"]
    return seen

def test_a_student_starts_as_a_copy_of_its_teacher_the_model_before(ladder):
    """Bit for bit; and its targets come from that same model, not from the first one."""
    assert not ladder.stages[0].targets and not torch.equal(ladder.stages[1].end, ladder.stages[0].end)
    for before, stage in zip(ladder.stages, ladder.stages[1:]):
        assert torch.equal(stage.start, before.end)
        assert stage.targets and all(torch.equal(teacher, before.end) for teacher, _ in stage.targets)

def test_each_model_trains_as_often_and_on_the_clock_that_it_should(ladder):
    """Students of 2 and 1 steps get twice as many updates; a student of N steps sees t = 1/N, ..., 1."""
    assert [len(stage.lr) for stage in ladder.stages] == [40, 12, 12]
    assert [stage.options["stage"] for stage in ladder.stages] == [0, 1, 2]     # random numbers of their own
    assert len(torch.cat([t for _, t, *_ in ladder.stages[0].calls]).unique()) > 300
    for stage, steps in zip(ladder.stages[1:], (2, 1)):
        times = torch.cat([t for _, t, *_ in stage.calls]).unique()
        assert times.tolist() == [i / steps for i in range(1, steps + 1)]

def teacher_rates(config, updates):
    """Up to lr in `warmup` updates, down to 0 in the last part, `decay`, of all updates."""
    decay, warmup = config.decay or 1e-9, max(1, config.warmup)
    return [config.lr * min((n + 1) / warmup, (1 - n / updates) / decay, 1) for n in range(updates)]

def test_learning_rate_warms_up_for_the_teacher_and_falls_to_zero_for_students(pd, ladder):
    """At every update, as Adam sees it."""
    config = pd.Config(**pd.PRESETS["digits"])
    assert ladder.stages[0].lr == pytest.approx(teacher_rates(config, 40))
    for stage in ladder.stages[1:]:
        assert stage.lr == pytest.approx([config.student_lr * (1 - n / 12) for n in range(12)])

def test_dropout_acts_for_the_teacher_and_not_for_students(pd):
    """Only a teacher in training says something else each time; a model that gives targets never does."""
    torch.manual_seed(0)
    data, models = torch.zeros(8, 1, 4, 4), [pd.Denoiser(awake(pd.UNet(1, 8, dropout=0.5))) for _ in range(2)]
    with watching(pd) as seen:
        pd.train(models[0], data, 2, batch_size=4)
        models[1].train()                                       # as if somebody had left it so
        pd.train(models[1], data, 2, batch_size=4, teacher=models[0], steps=2)
    assert [set(stage.random) for stage in seen.stages] == [{True}, {False}]
    assert not models[0].training and not models[1].training

def test_all_of_the_data_are_drawn(ladder):
    """The teacher has seen each of the 24 pictures."""
    corners = torch.cat([x[:, 0, 0, 0] for x, *_ in ladder.stages[0].calls])
    assert pixels(corners).unique().tolist() == [10 * i for i in range(24)]

def average(stage, ema):
    """The moving average of the weights after each update, with a short memory at first."""
    result = stage.start
    for n, weights in enumerate(stage.weights, 1):
        result = min(ema, n / (n + 9)) * result + (1 - min(ema, n / (n + 9))) * weights
    return result

def test_teacher_ends_as_the_moving_average_of_its_weights_and_students_as_they_are(pd, ladder):
    """That is what its students start from and what its file holds."""
    first, *others = ladder.stages
    close(first.end, average(first, pd.Config(**pd.PRESETS["digits"]).ema), "a weight", atol=1e-6)
    assert not torch.allclose(first.end, first.weights[-1], atol=1e-4)
    assert all(torch.equal(stage.end, stage.weights[-1]) for stage in others)
    for stage, model in zip(ladder.stages, ladder.models.values()):
        assert torch.equal(stage.end, numbers(model))

def test_training_clips_gradients_averages_weights_and_logs_means(pd):
    """Adam gets gradients of norm 1 at most; the average has `ema` of memory; a row of the log is the mean
    since the last one, of the loss and of the norm before clipping."""
    model = pd.Denoiser(PointNet())
    with watching(pd) as seen:
        points = 30 * normal(64, 2).float()
        log = pd.train(model, points, 61, ema=0.8, lr=0.01, warmup=4, batch_size=8, every=2)
    (stage,) = seen.stages
    losses = [loss for *_, loss in stage.calls]
    close(stage.end, average(stage, 0.8), "a weight", atol=1e-6)
    assert max(stage.norms) == pytest.approx(1, rel=1e-4) and log[0]["grad_norm"] > 2
    assert stage.lr[:5] == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01])
    assert [row["update"] for row in log] == [*range(2, 61, 2), 61]
    assert [row["lr"] for row in log] == [stage.lr[row["update"] - 1] for row in log]
    means = [sum(losses[n:n + 2]) / len(losses[n:n + 2]) for n in range(0, 61, 2)]
    assert [row["loss"] for row in log] == pytest.approx(means, rel=1e-4)

def test_finished_files_hold_a_models_record_and_nothing_half_trained(ladder):
    """No optimizer and no average; name, steps and updates; the log, which is also log.csv."""
    logged = []
    for (steps, record), stage in zip(ladder.files.items(), ladder.stages):
        name = "teacher" if steps == 4 else f"student-{steps}"
        assert (record["name"], record["steps"], record["updates"]) == (name, steps, len(stage.lr))
        assert not {"optimizer", "average"} & record.keys()
        assert record["log"] == stage.log and record["seconds"] > 0
        logged += [{"model": name} | {key: str(value) for key, value in row.items()} for row in stage.log]
    assert list(csv.DictReader(open(ladder.out / "log.csv"))) == logged
    assert list(logged[0]) == ["model", "update", "loss", "grad_norm", "lr"]
    assert sorted(file.name for file in ladder.out.iterdir()) == sorted(
        "config.json log.csv results.json samples.png steps.png student-1.pt student-2.pt teacher.pt".split())

def middle(net, images):
    """The bottleneck's spatial means at t = 0.1, from a hook on the last layer in the network's middle."""
    found, z = [], ref.alpha_sigma(0.1)[0] * (images.double() / 127.5 - 1)
    hook = net.middle2.register_forward_hook(lambda layer, inputs, out: found.append(out.mean((2, 3))))
    with torch.no_grad():
        net(z.float(), torch.full((len(images),), 0.1))
    hook.remove()
    return found[0]

def drawn(ladder, own, steps, sampler="ddim"):
    """What the model of `own` steps drew in the evaluation with so many steps: (its call, the pixels)."""
    (call, *_) = [call for call in ladder.samples if torch.equal(call.model, numbers(ladder.models[own]))
                  and call.how == (steps, sampler, False, 1.0)] or [None]
    assert call, f"the model of {own} steps never drew with {steps} {sampler} steps"
    return call, pixels(call.x)

def test_figures_are_those_of_an_independent_computation(pd, ladder, pictures):
    """Features by a hook, distances by scipy, samples by the float64 reference from the files' weights."""
    real, best = middle(ladder.models[4].net, pd.load_dataset(str(pictures))[0]), drawn(ladder, 4, 4)[1]
    assert [row["steps"] for row in ladder.rows] == [4, 2, 1]
    for row, stage in zip(ladder.rows, ladder.stages):
        assert list(row) == ["steps", "distilled", "ddim", "ancestral", "drift", "seconds", "updates"]
        steps = row["steps"]
        for column, own, sampler in (("distilled", steps, "ddim"), ("ddim", 4, "ddim"),
                                     ("ancestral", 4, "ancestral")):
            call, images = drawn(ladder, own, steps, sampler)
            assert torch.equal(call.z, ladder.samples[0].z)
            if sampler == "ddim":
                exact = ref.sample(lambda z, t: ladder.models[own](z.float(), t), call.z, steps)
                assert (images - pixels(exact)).abs().max() <= 1
            expected = ref.frechet_distance(real, middle(ladder.models[4].net, images))
            assert row[column] == pytest.approx(expected, rel=1e-3), (steps, column)
        drift = ((drawn(ladder, steps, steps)[1] - best) / 127.5).square().mean().sqrt().item()
        assert row["drift"] == pytest.approx(drift, abs=1e-5)
        assert row["updates"] == len(stage.lr)
        assert row["seconds"] == pytest.approx(ladder.files[steps]["seconds"])

def test_printed_table_and_plots_show_these_figures(pd, ladder):
    """The columns under their heads, and the three curves."""
    words = [line.lower().split() for line in ladder.printed.splitlines()]
    (head,) = [line for line in words if {"steps", "distilled", "updates"} <= set(line)]
    table = [dict(zip(head, map(float, line))) for line in words[words.index(head) + 1:][:3]]
    for row, shown in zip(ladder.rows, table, strict=True):
        assert shown == pytest.approx(row, rel=1e-3, abs=1e-9)
    rows = [{"steps": n, "distilled": n + 0.1, "ddim": n + 0.2, "ancestral": n + 0.3} for n in (4, 2, 1)]
    for line in pd.plot_steps(rows).axes[0].lines:
        label = line.get_label().lower()
        key = "ddim" if "ddim" in label else "ancestral" if "ancestral" in label else "distilled"
        assert list(line.get_xdata()) == [4, 2, 1] and list(line.get_ydata()) == [row[key] for row in rows]

def test_samples_png_has_a_labelled_row_of_pictures_for_every_model(pd, ladder):
    """And for the teacher with the last few steps; the label says whose they are."""
    config, record = pd.Config(**ladder.files[4]["config"]), {"seconds": 1, "updates": 1}
    _, found = pd.evaluate({steps: (model, record) for steps, model in ladder.models.items()},
                           pd.load_dataset(config.dataset)[0], config, "cpu")
    who = [re.match(r"(teacher|student)\D*(\d+)", label).groups() for label in found]
    assert set(who) == {("teacher", "4"), *product(("teacher", "student"), "21")}
    for (name, steps), images in zip(who, found.values()):
        own = 4 if name == "teacher" else int(steps)
        assert (images - drawn(ladder, own, int(steps))[1]).abs().max() <= 1, (name, steps)
    (axes,) = pd.plot_samples(found).axes
    assert [tick.get_text() for tick in axes.get_yticklabels()] == list(found)
    shown = np.asarray(axes.get_images()[0].get_array())
    for row, images in zip(shown.reshape(len(found), -1, shown.shape[1]), found.values(), strict=True):
        assert (row[1:9, 1:7] == images[0, 0].numpy()).all()                    # inside of a white frame

def test_every_flag_reaches_its_place(pd, pictures, tmp_path):
    """Each setting is seen where it acts: at the loss, the target, Adam, the network, the samplers."""
    flags = ("--weighting snr+1 --substeps 3 --param both --batch-size 6 --width 12 --final-steps 2 "
             "--teacher-updates 7 --student-updates 4 --eval-samples 9 --lr 0.004 --student-lr 0.003").split()
    with watching(pd) as seen:
        for seed in (5, 6):
            run = [*TINY, "--dataset", pictures, "--out", tmp_path / str(seed), *flags, "--seed", seed]
            assert command(pd, *run) == 0
    teacher, first, last, again, *_ = seen.stages
    for stage in seen.stages:
        assert {(weighting, len(t)) for _, t, weighting, _ in stage.calls} == {("snr+1", 6)}
        assert {substeps for _, substeps in stage.targets} <= {3}
    assert [len(stage.lr) for stage in (teacher, first, last)] == [7, 4, 8]
    assert teacher.lr == pytest.approx(teacher_rates(pd.Config(lr=0.004), 7))
    assert first.lr == pytest.approx([0.003 * (1 - n / 4) for n in range(4)])
    assert {file.name for file in tmp_path.glob("5/*.pt")} == {"student-2.pt", "student-6.pt", "teacher.pt"}
    denoiser, record = pd.load_model(tmp_path / "5" / "student-6.pt")
    assert denoiser.param == "both" and record["steps"] == 6
    assert numbers(denoiser).numel() == numbers(pd.UNet(1, 12, outputs=2)).numel()
    assert {(call.how[0], len(call.z)) for call in seen.samples} == {(18, 9), (6, 9), (2, 9)}
    assert not torch.equal(again.start, teacher.start)
    assert not torch.equal(again.calls[0][0], teacher.calls[0][0])
    assert not torch.equal(seen.samples[-1].z, seen.samples[0].z)

@pytest.mark.parametrize("preset", ["digits", "grey", "grey-cpu", "large", "large-cpu", "paper"])
def test_every_preset_reaches_its_place(pd, preset, pictures, tmp_path):
    """Rates, average, flips, dropout, network; updates and rate of an early student, of 17 steps."""
    config, out = pd.Config(**pd.PRESETS[preset]), tmp_path / "run"
    with watching(pd) as seen:
        run = ["--preset", preset, "--dataset", pictures, "--out", out, *TINY[2:], "--teacher-updates", 3,
               "--student-updates", 10, "--stages", 1, "--final-steps", 17, "--eval-samples", 2]
        assert command(pd, *run) == 0
    teacher, student = seen.stages
    assert teacher.lr == pytest.approx(teacher_rates(config, 3))
    assert len(student.lr) == math.ceil(10 * config.early_share)
    assert student.lr[0] == pytest.approx(config.early_lr)
    close(teacher.end, average(teacher, config.ema), "a weight", atol=1e-6)
    for stage in seen.stages:
        assert stage.options["ema"] == config.ema and stage.options["flip"] == config.flip
        assert {weighting for _, _, weighting, _ in stage.calls} == {config.weighting}
    net = pd.load_model(out / "teacher.pt")[0].net
    expected = pd.UNet(1, 8, config.mults, config.blocks, config.attention, config.dropout, config.patch)
    assert [p.shape for p in net.parameters()] == [p.shape for p in expected.parameters()]
    assert {layer.dropout for layer in net.modules() if hasattr(layer, "dropout")} == {config.dropout}

def test_eps_has_the_weighting_that_does_not_diverge(pd):
    """--param eps takes SNR unless something else is asked for (Table 1)."""
    assert pd.Config(param="eps").weighting == "snr" and pd.Config(param="x").weighting == "truncated"
    assert pd.Config(param="eps", weighting="truncated").weighting == "truncated"

# ---- 8. A run's files, resume, wrong input, many processes -------------------------------------------------

def one_error(capsys):
    """The last line that wrong input leaves on stderr."""
    errors = capsys.readouterr().err
    last = errors.splitlines()[-1]
    assert last.startswith("pd.py: error: ") and len(last) < 700 and "Traceback" not in errors, errors
    return last

def same_run(a, b):
    """All of two runs that must be equal is equal: weights, log, figures, but no times."""
    assert sorted(file.name for file in a.iterdir()) == sorted(file.name for file in b.iterdir())
    for file in a.glob("*.pt"):
        one, two = (torch.load(folder / file.name, weights_only=True) for folder in (a, b))
        assert all(torch.equal(one["model"][key], two["model"][key]) for key in one["model"]), file.name
        assert one["log"] == two["log"] and one.keys() == two.keys()
    one, two = (json.loads((folder / "results.json").read_text()) for folder in (a, b))
    for row in one["rows"] + two["rows"]:
        del row["seconds"]
    assert one == two and (a / "log.csv").read_text() == (b / "log.csv").read_text()

def test_only_restart_overwrites_a_run(pd, ladder, pictures, tmp_path, capsys):
    """The same command again changes nothing, other settings are refused; nothing is left after --restart."""
    out = shutil.copytree(ladder.out, tmp_path / "run")
    same = [*TINY, "--dataset", pictures, "--out", out]
    before = {file: file.read_bytes() for file in out.iterdir()}
    assert command(pd, *same, "--teacher-updates", 40) == 0 and "finished" in capsys.readouterr().out
    assert command(pd, *same, "--width", 16, "--seed", 3) == 2
    error = one_error(capsys)
    assert all(word in error for word in ("seed", "width", "8", "16", "--restart"))
    assert before == {file: file.read_bytes() for file in out.iterdir()}
    (out / "teacher.pt.part").write_text("left by a process that was killed")
    assert command(pd, *same, "--stages", 1, "--restart") == 0
    assert sorted(file.name for file in out.glob("*.p*t*")) == ["student-1.pt", "teacher.pt"]

def test_sample_writes_a_grid_an_npz_or_a_folder_of_the_same_pictures(pd, ladder, tmp_path, capsys):
    """Of the wanted number, seed, steps, sampler and clipping; pictures of two commands never mix."""
    sample = ("--sample", ladder.out / "student-2.pt", "--num", 5, "--seed", 7)
    for out in ("folder", "grid.png"):
        assert command(pd, *sample, "--out", tmp_path / out) == 0
    expected = pd.generate(ladder.models[2], 5, (1, 8, 6), 2, seed=7)[:, 0].numpy()
    files = [np.array(Image.open(file)) for file in sorted((tmp_path / "folder").iterdir())]
    assert (np.stack(files) == expected).all()
    grid = np.array(Image.open(tmp_path / "grid.png"))
    grid = grid[::grid.shape[0] // 16, ::grid.shape[1] // 18]                   # 3 columns, 2 rows, enlarged
    assert (grid[:8, :6] == expected[0]).all() and (grid[8:, 6:12] == expected[4]).all()
    for flags, options in (((), {}), (("--steps", 1), {"steps": 1}), (("--clip",), {"clip": True}),
                           (("--sampler", "heun"), {"sampler": "heun"})):
        with watching(pd) as seen:
            assert command(pd, *sample, *flags, "--out", tmp_path / "deep" / "er.npz") == 0
        assert {call.how[2] for call in seen.samples} == {"--clip" in flags}
        expected = pd.generate(ladder.models[2], 5, (1, 8, 6), **{"steps": 2, "seed": 7} | options)
        array = np.load(tmp_path / "deep" / "er.npz")["arr_0"]
        assert array.dtype == np.uint8 and (array == expected.permute(0, 2, 3, 1).numpy()).all()
    assert command(pd, *sample, "--out", tmp_path / "folder") == 2
    assert "folder" in one_error(capsys) and len(list((tmp_path / "folder").iterdir())) == 5

def test_pictures_in_colour_go_all_the_way(pd, tmp_path, monkeypatch):
    """A folder of JPEG files, resized; the default folder of the run; a grid in colour."""
    save_pictures(tmp_path / "mine" / "a", np.random.default_rng(0).integers(0, 256, (6, 20, 24, 3)), "jpg")
    monkeypatch.chdir(tmp_path)
    assert command(pd, *TINY, "--dataset", "mine", "--size", 15) == 0
    assert command(pd, "--sample", "runs/mine/student-1.pt", "--num", 5, "--out", "x.png") == 0
    grid = Image.open("x.png")
    assert grid.mode == "RGB" and grid.size[0] * 2 == grid.size[1] * 3

class Evil:
    """What a malicious checkpoint does when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("evil",)

@pytest.mark.parametrize("kind", ["missing", "text", "truncated", "foreign", "code", "other net"])
def test_what_is_no_checkpoint_is_one_line_and_its_code_never_runs(pd, kind, ladder, pictures, tmp_path,
                                                                   monkeypatch, capsys):
    """Neither for --sample nor as a file of a run to be continued."""
    monkeypatch.chdir(tmp_path)
    content, path = ladder.files[4], tmp_path / "run" / "teacher.pt"
    path.parent.mkdir()
    for name in ("config.json", "teacher.pt"):
        shutil.copy(ladder.out / name, path.parent)
    if kind in ("missing", "text"):
        path.unlink()
    if kind == "text":
        path.write_text("no checkpoint")
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    elif kind != "missing":
        torch.save({"foreign": {"weights": torch.zeros(3)}, "code": content | {"model": Evil()},
                    "other net": content | {"config": content["config"] | {"width": 16}}}[kind], path)
    assert command(pd, "--sample", path, "--out", "x.png") == 2
    assert "teacher.pt" in one_error(capsys) and not Path("x.png").exists() and not Path("evil").exists()
    if kind != "missing":
        run = [*TINY, "--dataset", pictures, "--out", path.parent, "--teacher-updates", 40]
        assert command(pd, *run) == 2 and "--restart" in one_error(capsys) and not Path("evil").exists()

NUMERIC = ("size stages final-steps substeps teacher-updates student-updates batch-size width lr student-lr "
           "eval-samples seed").split()
WRONG = {                                                       # what is given: a word that the error holds
    "--dataset nothing": "no data set", "--dataset empty": "0 pictures", "--dataset one": "at least 2",
    "--dataset text": "a.png is not a readable", "--dataset mixed": "--size", "--dataset deep": "8 bits",
    "--dataset mnist": "could not be loaded", "--dataset cifar10": "could not be loaded",
    "--device tpu": "device", "--device cuda": "device", "--device mps": "device", "--out file": "file",
    "--out file/below": "file",
    "--out foreign": "--restart", "--out damaged": "damaged", "--stages 13 --substeps 3": "8,192",
    "--stages x": "int", "--param w": "invalid choice", "--weighting none": "invalid choice",
    "--preset huge": "invalid choice", "--unknown": "unrecognized", "--stage 3": "unrecognized",
    "--lr": "expected one", "--num 3": "needs --sample", "--clip": "needs --sample",
    "--sample student-2.pt --steps 0": "--steps must", "--sample student-2.pt --sampler e": "invalid choice",
    "--sample student-2.pt --lr 1": "does not go", "--sample student-2.pt --num 0": "--num must",
    "--sample student-2.pt --out file/x.png": "file", "--sample student-2.pt --out file": "file",
    "--sample config.json": "no checkpoint", "--sample .": "no checkpoint",
    "--lr 1e9 --teacher-updates 40": "not finite",
    **{f"--{name} {value}": name for name in NUMERIC for value in ("-1", "nan", "word")},
    **{f"--{name} 0": name for name in NUMERIC if name not in ("seed", "lr", "student-lr")}}

@pytest.fixture(scope="session")
def corner(ladder, tmp_path_factory):
    """A folder with all that the wrong commands speak of."""
    folder = tmp_path_factory.mktemp("corner")
    for name in ("empty", "text", "foreign", "damaged", "deep"):
        (folder / name).mkdir()
    for name, text in (("file", "a file"), ("text/a.png", "no picture"), ("text/b.png", "no picture"),
                       ("foreign/teacher.pt", "somebody's"), ("damaged/config.json", "{")):
        (folder / name).write_text(text)
    save_pictures(folder / "mixed", [np.zeros((8, 8)), np.zeros((16, 16))])
    save_pictures(folder / "one", [np.zeros((8, 8))])
    for name in "ab":
        Image.fromarray(np.zeros((8, 8), np.int32)).save(folder / "deep" / f"{name}.tif")
    for name in ("student-2.pt", "config.json"):
        shutil.copy(ladder.out / name, folder)
    return folder

@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_input_is_one_line_with_status_2_and_leaves_nothing(pd, wrong, corner, monkeypatch, capsys):
    """The line says what is wrong; nothing is written, nothing is downloaded."""
    if wrong in ("--device cuda", "--device mps") and getattr(torch, wrong.split()[1]).is_available():
        pytest.skip("it is here")
    monkeypatch.chdir(corner)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    before = {file: file.is_dir() or file.read_bytes() for file in corner.rglob("*")}
    assert command(pd, *([] if "--sample" in wrong else TINY), *wrong.split()) == 2
    assert WRONG[wrong] in one_error(capsys)
    begun = WRONG[wrong] == "not finite"                        # its folder and its last good state stay
    assert begun or before == {file: file.is_dir() or file.read_bytes() for file in corner.rglob("*")}
    shutil.rmtree(corner / "runs", ignore_errors=True)

unix = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks, and sends signals")

def attempts_here(file, args, kills):
    """Run pd.py in a forked child for each of `kills`, saving often, and print how they ended."""
    import resource
    module, statuses = load(Path(file).read_text(encoding="utf8"), file), []
    train, replace, count = module.train, os.replace, iter(range(10**9))
    module.train = lambda *args, **options: train(*args, **options | {"every": 3})
    torch.set_num_threads(1)
    for kind, value in json.loads(kills):
        def dying_replace(*paths):
            if next(count) == value:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(*paths)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                if kind == "write":                             # die while the n-th file is being written
                    os.replace = dying_replace
                if kind == "full":                              # no file may grow beyond that many bytes
                    resource.setrlimit(resource.RLIMIT_FSIZE, (value, value))
                status = command(module, *json.loads(args))
            finally:
                os._exit(status)
        if kind in ("kill", "ctrl-c"):
            time.sleep(value)
            os.kill(child, signal.SIGKILL if kind == "kill" else signal.SIGINT)
        statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    print(json.dumps(statuses))

def attempts(pd, pictures, out, *kills):
    """(how one try for each of `kills` ended, what they left on stderr)"""
    args = [*TINY, "--dataset", str(pictures), "--out", str(out)]
    done = subprocess.run(in_a_process("attempts_here", pd.__file__, json.dumps(args), json.dumps(kills)),
                          capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr

@pytest.fixture(scope="session")
def undisturbed(module, pictures, tmp_path_factory):
    """(a run that saves often, the seconds that it took)"""
    out = tmp_path_factory.mktemp("runs") / "run"
    assert attempts(module, pictures, out, ("", 0))[0] == [0]
    return out, (out / "results.json").stat().st_mtime - (out / "config.json").stat().st_mtime

@unix
def test_a_run_killed_at_any_moment_ends_as_if_it_had_not_been(pd, pictures, undisturbed, tmp_path):
    """While it writes its n-th file, and at random moments all over the run: the same bit for bit."""
    out, seconds = undisturbed
    moments = random.Random(0)
    kills = [("write", n) for n in (0, 1, 2, 4, 5)]
    kills += [("kill", moments.uniform(0, seconds)) for _ in range(5)] + [("write", 3), ("write", 0), ("", 0)]
    statuses, _ = attempts(pd, pictures, tmp_path / "run", *kills)
    assert statuses[-1] == 0 and statuses.count(-signal.SIGKILL) >= 6
    assert set(statuses) <= {0, -signal.SIGKILL}
    same_run(out, tmp_path / "run")

@unix
def test_after_a_full_disk_and_ctrl_c_the_same_command_continues(pd, pictures, undisturbed, tmp_path):
    """They are one line, status 2 and 130, and no traceback."""
    out, seconds = undisturbed
    kills = [("full", 30_000), ("full", 100), ("ctrl-c", seconds / 2), ("", 0)]
    statuses, errors = attempts(pd, pictures, tmp_path / "run", *kills)
    assert statuses[:2] == [2, 2] and statuses[2] in (0, 130) and statuses[3] == 0
    assert "Traceback" not in errors and errors.count("pd.py: error: ") == 2
    assert errors.count("pd.py: stopped") == statuses.count(130)
    same_run(out, tmp_path / "run")

MORE = ("--preset digits --width 16 --teacher-updates 40 --student-updates 30 --stages 1 --batch-size 16 "
        "--eval-samples 300 --device cpu").split()

def torchrun(pd, pictures, out, options, *flags):
    """The command under torchrun, begun."""
    line = [sys.executable, "-m", "torch.distributed.run", *options.split(), pd.__file__, *MORE, *flags,
            "--dataset", str(pictures), "--out", str(out)]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})

@unix
def test_two_processes_on_two_machines_train_the_model_that_one_trains(pd, pictures, tmp_path):
    """To 1e-5, with dropout; two rendezvous agents on the loopback are the two machines."""
    one, two = tmp_path / "one", tmp_path / "two"
    assert command(pd, *MORE, "--dataset", pictures, "--out", one) == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = (f"--nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:{port} "
               "--rdzv-id pd --local-addr 127.0.0.1")
    agents = [torchrun(pd, pictures, two, options) for _ in range(2)]
    try:
        outputs = [agent.communicate(timeout=400)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    assert sum("is finished" in output for output in outputs) == 1              # one process speaks
    for name in ("teacher.pt", "student-1.pt"):
        a, b = (torch.load(run / name, weights_only=True)["model"].values() for run in (one, two))
        a, b = (torch.cat([w.flatten() for w in weights]) for weights in (a, b))
        assert (a - b).norm() < 1e-5 * a.norm(), name
    a, b = (json.loads((run / "results.json").read_text()) for run in (one, two))
    assert a["config"] == b["config"] and (a["processes"], b["processes"]) == (1, 2)
    for x, y in zip(a["rows"], b["rows"], strict=True):
        for key in ("distilled", "ddim", "ancestral", "drift"):
            assert x[key] == pytest.approx(y[key], rel=0.01, abs=0.001), key

@unix
def test_a_process_that_dies_ends_the_run_with_an_error(pd, pictures, tmp_path):
    """torchrun ends the others, and what was saved is whole."""
    out, until = tmp_path / "run", time.monotonic() + 400
    run = torchrun(pd, pictures, out, "--standalone --nproc-per-node 2", "--student-updates", "100000")
    try:
        while not (out / "teacher.pt").exists() and run.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        workers = subprocess.check_output(["ps", "-o", "pid=", "--ppid", str(run.pid)], text=True, timeout=60)
        os.kill(int(workers.split()[-1]), signal.SIGKILL)
        output, _ = run.communicate(timeout=400)
    finally:
        run.kill()
    assert run.returncode != 0 and not (out / "results.json").exists(), output
    assert pd.load_model(out / "teacher.pt")[1]["updates"] == 40

def test_a_batch_must_be_shared_evenly(pd, monkeypatch, pictures, tmp_path, capsys):
    """By all processes."""
    monkeypatch.setattr(pd, "WORLD", 3)
    for name in ("init_process_group", "barrier"):
        monkeypatch.setattr(torch.distributed, name, lambda *args: None)
    assert command(pd, *TINY, "--dataset", pictures, "--out", tmp_path / "run") == 2
    assert "batch" in one_error(capsys)

@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_gpu_agrees_with_the_cpu_and_compiled_with_plain(pd, pictures, tmp_path):
    """Within bfloat16: predictions, samples, and the losses of a run."""
    cpu, losses = pd.Denoiser(awake(pd.UNet(1, 32, attention=(2,)))), []
    z, t = torch.randn(16, 1, 8, 8), torch.rand(16)
    for compiling in ("--no-compile", "--compile"):
        gpu = pd.Denoiser(copy.deepcopy(cpu.net).cuda())
        if compiling == "--compile":
            gpu.net.compile()
        with torch.no_grad():
            for exact, other in ((cpu(z, t)[0], gpu(z.cuda(), t.cuda())[0]),
                                 (pd.sample(cpu, z, 4), pd.sample(gpu, z.cuda(), 4))):
                assert (exact - other.cpu()).std() < 0.05 * exact.std()
        out = tmp_path / compiling
        assert command(pd, *TINY, "--dataset", pictures, "--device", "cuda", compiling, "--out", out) == 0
        losses.append([float(row["loss"]) for row in csv.DictReader(open(out / "log.csv"))])
    assert losses[0] == pytest.approx(losses[1], rel=0.1)

# ---- 9. The README and the notebook ------------------------------------------------------------------------
SITE = Path(official.__file__).resolve().parent

def test_readme_names_functions_and_tests_that_exist():
    """The table of where the paper is, and the commands of this file."""
    text = (SITE / "README.md").read_text(encoding="utf8")
    tests = set(re.findall(r"`(test_\w+)`", text)) - {"test_pd"}
    rows = "\n".join(row for row in text.splitlines() if "`test_" in row)
    functions = set(re.findall(r"`([a-zA-Z]\w+)`", rows))
    assert tests and not [name for name in tests if name not in globals()]
    assert not [name for name in functions - tests if not hasattr(official, name)]

@pytest.fixture(scope="module")
def cells():
    return json.loads((SITE / "tutorial.ipynb").read_text(encoding="utf8"))["cells"]

def test_notebook_is_short_and_was_run_once_from_top_to_bottom(cells):
    """No errors, no warnings, nothing that needs a program to be seen."""
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    outputs = [output for cell in code for output in cell["outputs"]]
    kinds = [kind for output in outputs for kind in output.get("data", {})]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert set(kinds) <= {"image/png", "text/plain"} and kinds.count("image/png") <= 21 and len(cells) <= 110
    assert sum(bool(line.strip()) for cell in code for line in "".join(cell["source"]).splitlines()) <= 760

def test_exercises_of_the_notebook_fail_when_unsolved_and_pass_when_solved(cells, monkeypatch):
    """Cells are tagged setup, exercise:NAME, answer:NAME (hidden, into ANSWERS) and check:NAME."""
    def run(tag):
        (code,) = ["".join(cell["source"]) for cell in cells if tag in cell["metadata"].get("tags", [])]
        exec(code, space)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.chdir(SITE)
    space = {"__name__": "notebook"}
    tags = [tag for cell in cells for tag in cell["metadata"].get("tags", [])]
    for cell in cells:
        if "setup" in cell["metadata"].get("tags", []):
            exec("".join(cell["source"]), space)
    names = [tag.partition(":")[2] for tag in tags if tag.startswith("exercise:")]
    assert len(names) >= 8 and len(names) == len(set(names))
    for name in names:
        run(f"exercise:{name}")
        space["ANSWERS"].clear()
        with pytest.raises(NotImplementedError):
            run(f"check:{name}")
        run(f"answer:{name}")
        run(f"check:{name}")

# ---- 10. Benchmark, seeds, command line --------------------------------------------------------------------

def seconds_of(job):
    """(the median of several calls, what the first takes more: compiling)"""
    from torch.utils.benchmark import Timer
    began = time.monotonic()
    job()
    first = time.monotonic() - began
    timer = Timer("job()", globals={"job": job}, num_threads=torch.get_num_threads())
    median = timer.adaptive_autorange(max_run_time=60).median
    return median, max(0.0, first - median)

def speed(job, device):
    """(seconds, TFLOP/s, peak memory in GB, seconds of compiling) of a job."""
    from torch.utils.flop_counter import FlopCounterMode
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        job()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    (seconds, compiling), peak = seconds_of(job), math.nan
    with contextlib.suppress(ImportError):                      # not on Windows
        import resource
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else peak
    return seconds, counter.get_total_flops() / seconds / 1e12, peak / 1e9, compiling

def benchmark(dataset, batch_size, width, device, compiling):
    """Print how fast training and sampling are, and their share of the best that this machine can do."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    cuda, digits = device.type == "cuda", dataset == "digits"
    preset = "digits" if digits else "large" if cuda else "large-cpu"
    kind = torch.bfloat16 if cuda else torch.float32
    flags = {"batch_size": batch_size, "width": width, "shape": (9, 1, 8, 8) if digits else (9, 3, 32, 32)}
    config = official.Config(**official.PRESETS[preset] | {key: flag for key, flag in flags.items() if flag})
    model, teacher = official.build(config, device), official.build(config, device)
    for denoiser in (model, teacher):
        denoiser.net.compile(disable=not (cuda if compiling is None else compiling))
    tensor = functools.partial(torch.randn, device=device, dtype=kind)
    with torch.no_grad():
        matmul = max(speed(functools.partial(torch.mm, tensor(size, size), tensor(size, size)), device)[1]
                     for size in ((4096, 8192, 16384) if cuda else (1024, 2048)))
        conv = 0.0
        for width, size in ((32, 8), (64, 8), (128, 16), (256, 16)):
            h, w = tensor(config.batch_size, width, size, size), tensor(width, width, 3, 3)
            h = h.to(memory_format=torch.channels_last)
            conv = max(conv, speed(functools.partial(torch.conv2d, h, w, padding=1), device)[1])
    print(f"{device.type}, {kind}: best matmul {matmul:.3f}, best 3x3 convolution {conv:.3f} TFLOP/s")
    B = config.batch_size
    data = torch.randint(256, (1024, *config.shape[1:]), dtype=torch.uint8, device=device)
    train = functools.partial(official.train, model, data, 10, batch_size=B, flip=config.flip)
    draw = functools.partial(official.generate, model, official.CHUNK, config.shape[1:], device=device)
    for name, num, job in (("teacher update", 10 * B, train),
                           ("student update", 10 * B, functools.partial(train, teacher=teacher, steps=4)),
                           ("sampling, 1 step", official.CHUNK, functools.partial(draw, 1)),
                           ("sampling, 256 steps", official.CHUNK, functools.partial(draw, 256))):
        seconds, tflops, peak, first = speed(job, device)
        print(f"{name:20}{num / seconds:12,.0f} images/s{tflops:12.6f} TFLOP/s, {tflops / matmul:.0%} of the "
              f"best matmul, {tflops / conv:.0%} of the best convolution, peak {peak:.2f} GB, compiling "
              f"{first:.1f} s", flush=True)

def seeds(number):
    """Print the README's table: raw-pixel Fréchet distances of the digits, for so many seeds."""
    real, rows = official.load_dataset("digits")[0].flatten(1) / 127.5, []
    print("| seed | teacher, 256 steps | student, 4 | 2 | 1 | the same teacher's DDIM, 4 | 2 | 1 | seconds |")
    print("|---:" * 9 + "|")
    for seed in range(number):
        out, models = Path(f"runs/seed-{seed}"), {}
        if not (out / "results.json").exists():
            with contextlib.redirect_stdout(sys.stderr):
                official.main(["--dataset", "digits", "--seed", str(seed), "--out", str(out)])
        for name in ("teacher", "student-4", "student-2", "student-1"):
            models[name] = official.load_model(out / f"{name}.pt")[0]
        rows.append([])
        for name, steps in (("teacher", 256), ("student-4", 4), ("student-2", 2), ("student-1", 1),
                            ("teacher", 4), ("teacher", 2), ("teacher", 1)):
            drawn = official.generate(models[name], len(real), (1, 8, 8), steps, seed=seed)
            rows[-1].append(official.frechet_distance(real, drawn.flatten(1) / 127.5))
        rows[-1].append(sum(torch.load(file, weights_only=True)["seconds"] for file in out.glob("*.pt")))
        print(table_row(seed, rows[-1]), flush=True)
    print(table_row("mean", np.mean(rows, 0)))

def table_row(name, figures):
    teacher, *students = figures[:4]
    cells = [name, f"{teacher:.3f}", *(f"{student:.3f} ({student / teacher:.2f}x)" for student in students),
             *(f"{ddim:.2f}" for ddim in figures[4:7]), f"{figures[7]:.0f}"]
    return f"| {' | '.join(map(str, cells))} |"

def test_benchmark_measures_updates_and_sampling(capsys, monkeypatch):
    """A student's update costs 5/3 of a teacher's, and 256 steps 256 times one."""
    monkeypatch.setattr(official, "CHUNK", 2)
    monkeypatch.setattr(sys.modules[main.__module__], "seconds_of", lambda job: (0.5, 0.25))
    main("benchmark --width 8 --batch-size 4 --device cpu --no-compile".split())
    lines = capsys.readouterr().out.splitlines()
    speeds = [float(line.split("images/s")[0].split()[-1].replace(",", "")) for line in lines[1:]]
    tflops = [float(line.split("TFLOP/s")[0].split()[-1]) for line in lines[1:]]
    assert speeds == [80, 80, 4, 4]
    assert tflops[1] / tflops[0] == pytest.approx(5 / 3, rel=0.1)
    assert tflops[3] / tflops[2] == pytest.approx(256, rel=0.1)

def main(argv=None):
    parser = argparse.ArgumentParser("test_pd.py", description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("handout", help="a copy of pd.py with the exercises taken out")
    command.add_argument("file", metavar="FILE")
    command.add_argument("--only", nargs="+", choices=NAMES, default=NAMES,
                         metavar="NAME", help=", ".join(NAMES))
    command = commands.add_parser("grade", help="what filled-in copies get right, and what is wrong")
    command.add_argument("files", metavar="FILE", nargs="+")
    command.add_argument("--hint", choices=EXERCISES, metavar="NAME", help="one exercise, and a hint")
    command.add_argument("--json", metavar="OUT", help="also write the results here")
    command = commands.add_parser("hunt", help="a copy of pd.py with a mistake planted")
    command.add_argument("number", metavar="N", type=int, choices=range(1, len(HUNTS) + 1),
                         help=f"1 to {len(HUNTS)}")
    command.add_argument("file", metavar="FILE", nargs="?")
    command.add_argument("--answer", action="store_true", help="what the mistake is, and why it is one")
    command = commands.add_parser("benchmark", help="the speed of training and sampling on this machine")
    command.add_argument("--dataset", default="digits", help="digits or cifar10: its size and network")
    command.add_argument("--batch-size", type=int)
    command.add_argument("--width", type=int)
    command.add_argument("--device", help="default: a GPU if there is one")
    command.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default on a GPU")
    command = commands.add_parser("seeds", help="the README's table: the digits with several seeds")
    command.add_argument("number", metavar="N", type=int, nargs="?", default=3, help="how many, default 3")
    args = parser.parse_args(argv)
    try:
        if args.command == "handout":
            write_new(args.file, handout(Path(official.__file__).read_text(encoding="utf8"), args.only))
            print(f"{args.file}: exercises {', '.join(args.only)}")
        elif args.command == "grade":
            for file in args.files:
                Path(file).read_text(encoding="utf8")           # an error here, before any is graded
            grade_files(args.files, args.hint, args.json)
        elif args.command == "hunt":
            hunt(args.number, args.file, args.answer)
        elif args.command == "benchmark":
            benchmark(args.dataset, args.batch_size, args.width, args.device, args.compile)
        else:
            seeds(args.number)
    except (OSError, ValueError) as error:
        parser.error(" ".join(str(error).split()))

if __name__ == "__main__":
    main()
