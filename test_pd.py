"""The tests of pd.py, and the classroom kit that is made of them.

    python -m pytest test_pd.py                       # every test
    python test_pd.py handout FILE [--only NAME ...]  # a copy of pd.py with the exercises taken out
    python test_pd.py grade FILE... [--json OUT]      # what filled-in copies get right, and what is wrong
    python test_pd.py hunt N FILE                     # a copy of pd.py with a mistake, and its symptom
    python test_pd.py hunt N --answer                 # what mistake N is, and why

A test takes the module under test as `pd`: the official pd.py for pytest, somebody's answers for the grader.
Equations and algorithms are those of Salimans & Ho, arXiv:2202.00512.
"""
import argparse, ast, contextlib, copy, csv, inspect, io, json, math, os, pickle, random, re, resource
import select, shutil, signal, socket, subprocess, sys, tempfile, textwrap, threading, time, types
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from multiprocessing.connection import Connection
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image

OFFICIAL = Path(__file__).resolve().with_name("pd.py")


# ------------------------------------------------------------------------------------------------------------
# 1. Reference: the paper once more, in float64 and in log-SNR form, written without a look at pd.py
# ------------------------------------------------------------------------------------------------------------
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
        return mean + std * torch.randn(z.shape, dtype=torch.float64)

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


two_points = says(lambda z, a, s: torch.tanh(a * z / s**2))             # exact for x = ±1, each half the time


def gaussian_path(z, t, s, mean, variance):
    """The probability-flow map from z_t to z_s for x ~ N(mean, variance): (z - α mean) / sd(z) is kept."""
    (a_t, s_t), (a_s, s_s) = ref.alpha_sigma(t), ref.alpha_sigma(s)
    growth = (a_s**2 * variance + s_s**2) / (a_t**2 * variance + s_t**2)
    return a_s * mean + (z - a_t * mean) * growth.sqrt()


def recorded(model):
    """(a model that keeps what it is asked, the list of what it was asked)."""
    calls = []
    return lambda z, t: (calls.append((z, t)), model(z, t))[1], calls


# ------------------------------------------------------------------------------------------------------------
# 2. Graded tests: the docstring is the property, a Wrong says where it fails; together a student reads them
# ------------------------------------------------------------------------------------------------------------
PARAMS, SAMPLERS = ("v", "eps", "x", "both"), ("ddim", "ancestral", "heun")
WEIGHTINGS = ("truncated", "snr+1", "snr", "constant")
INNER = (0.1, 0.25, 0.5, 0.75, 0.9)
TIMES = (*INNER, 0.0, 1 / 8192, 1 - 1 / 8192, 1.0)
DRAWS, DATA = 100_000, torch.full((8, 2), 0.5)
EXERCISES = {                                                           # name: what is to be written
    "alpha_sigma": "α_t and σ_t",
    "log_snr": "λ_t",
    "v": "x̂ and ε̂ from v",
    "eps": "x̂ and ε̂ from ε",
    "x": "x̂ and ε̂ from x",
    "both": "x̂ and ε̂ from x̃ and ε̃",
    "loss_weight": "the WEIGHTINGS, functions of the SNR, and w(λ_t)",
    "weighted_loss": "the weighted x-error of each example",
    "ddim_step": "z_s from x̂ and ε̂",
    "ancestral_step": "a draw from the posterior",
    "heun_step": "the trapezoidal rule",
    "sample": "the sampler's loop",
    "distill_target": "x̃",
    "train": "the lines of Algorithm 2, the student's t and its target",
    "time_embedding": "cosines and sines of t",
}
GRADED = {name: [] for name in EXERCISES}                               # name: [(test, arguments beside pd)]


def graded(*names):
    """One point for each of these exercises. With several names the test gets its own as `param`."""
    def register(test):
        for name in names:
            GRADED[name].append((test, {"param": name} if len(names) > 1 else {}))
        return pytest.mark.parametrize("param", names)(test) if len(names) > 1 else test
    return register


class Wrong(AssertionError):
    """At which inputs a property fails."""


def check(condition, failure):
    if not condition:
        raise Wrong(failure)


def close(got, expected, what, rtol=1e-5, atol=0.0):
    """|got - expected| <= atol + rtol |expected| everywhere."""
    check(torch.is_tensor(got), f"{what} is no tensor")
    expected = expected if torch.is_tensor(expected) else torch.full(got.shape, expected, dtype=torch.float64)
    check(got.shape == expected.shape, f"{what} has shape {tuple(got.shape)}, not {tuple(expected.shape)}")
    got, expected = got.detach().double().flatten(), expected.double().flatten()
    excess = ((got - expected).abs() - atol - rtol * expected.abs()).nan_to_num(math.inf)
    if (excess > 0).any():
        numbers = got[excess.argmax()], expected[excess.argmax()]
        short, long = ([f"{n:.{digits}g}" for n in numbers] for digits in (5, 9))
        raise Wrong("{} is {}, not {}".format(what, *(short if short[0] != short[1] else long)))


def refuses(call, bad, choices):
    """A ValueError that names the bad value and what would be right."""
    try:
        call()
    except ValueError as error:
        check(all(str(c) in str(error) for c in (repr(bad), *choices)),
              f"the ValueError for {bad!r} should name it and what would be right, and says {str(error)!r}")
    else:
        raise Wrong(f"{bad!r} is accepted")


def listing(values):
    values = [f"{float(v):.5g}" for v in values]
    return ", ".join(values[:8]) + ", ..." * (len(values) > 8)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def example(t, *shape):
    """(x, ε, z_t)"""
    x, eps = normal(*shape, seed=1), normal(*shape, seed=2)
    return x, eps, ref.noisy(x, eps, t)


@graded("alpha_sigma")
def test_alpha_sigma_preserve_the_variance(pd):
    """α_t² + σ_t² = 1 at every t, a float (which gives float64 scalars) or a (B,) tensor (its type)"""
    for t in (*TIMES, torch.tensor(TIMES)):
        alpha, sigma = pd.alpha_sigma(t)
        close(alpha**2 + sigma**2, 1.0, f"the sum at t = {t}")
        like = t if torch.is_tensor(t) else torch.tensor(0.0, dtype=torch.float64)
        check(all((a.shape, a.dtype) == (like.shape, like.dtype) for a in (alpha, sigma)),
              f"their shape or type is wrong for t = {t}")


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
    for t in INNER:
        alpha, sigma = ref.alpha_sigma(t)
        close(pd.log_snr(t).exp(), alpha**2 / sigma**2, f"exp(λ_t) at t = {t:g}")
    t = torch.tensor(TIMES)
    close(pd.log_snr(t), ref.log_snr(t), "λ_t for a (B,) tensor t of float32", atol=1e-6)


@graded(*PARAMS)
def test_exact_output_gives_back_x_and_eps(pd, param):
    """a network that is right gives back the x and ε that z_t = α_t x + σ_t ε was made of, x first"""
    for t in INNER:
        x, eps, z = example(t, 2, 3)
        x_hat, eps_hat = pd.to_x_eps(ref.exact_output(x, eps, t, param), z, t, param)
        close(x_hat, x, f"x̂ at t = {t:g}")
        close(eps_hat, eps, f"ε̂ at t = {t:g}")


@graded(*PARAMS)
def test_x_hat_and_eps_hat_add_up_to_z(pd, param):
    """x̂ and ε̂ name one point on one line: α_t x̂ + σ_t ε̂ = z, whatever the network says"""
    for t in INNER:
        z, out = normal(2, 3), normal(2, 6 if param == "both" else 3, seed=3)
        close(ref.noisy(*pd.to_x_eps(out, z, t, param), t), z, f"the sum at t = {t:g}")


@graded("v", "both")
def test_at_the_ends_of_time_z_says_it_all(pd, param):
    """at t = 0 z is the data, so x̂ = z, and at t = 1 the noise, so ε̂ = z, whatever the network says"""
    z, out = normal(2, 3), normal(2, 6 if param == "both" else 3, seed=3)
    close(pd.to_x_eps(out, z, 0.0, param)[0], z, "x̂ at t = 0", atol=1e-3)
    close(pd.to_x_eps(out, z, 1.0, param)[1], z, "ε̂ at t = 1", atol=1e-3)


@graded(*PARAMS)
def test_x_hat_and_eps_hat_for_any_shape_and_a_t_per_example(pd, param):
    """x̂ and ε̂ are right for points, waves and pictures with a t for each example, and any output"""
    for shape in ((5, 2), (5, 2, 4), (5, 2, 4, 4)):
        z, out, t = normal(*shape), normal(*shape, seed=3), torch.tensor(INNER, dtype=torch.float64)
        out = torch.cat([out, out.flip(1) - 0.7], 1) if param == "both" else out
        for name, got, expected in zip("xε", pd.to_x_eps(out, z, t, param), ref.to_x_eps(out, z, t, param)):
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
def test_truncated_weight_makes_the_larger_loss(pd):
    """w is the larger of the SNR and 1 with "truncated": a one-step student works at t = 1, and it counts"""
    for t in (1.0, 0.75, 0.5, 0.25, 0.1, 0.0):
        close(pd.loss_weight(t, "truncated"), ref.loss_weight(t, "truncated"), f"w at t = {t:g}")


@graded("loss_weight")
def test_loss_weights_of_a_batch_are_finite(pd):
    """w has the shape of t and is finite in float32 at both ends; an unknown weighting is a ValueError"""
    t = torch.tensor([0.0, 1 / 8192, 0.3, 1.0])
    for weighting in WEIGHTINGS:
        got, expected = pd.loss_weight(t, weighting), ref.loss_weight(t, weighting)
        close(got, expected, f"w with {weighting!r} at t = {listing(t)}", 1e-4)
    refuses(lambda: pd.loss_weight(0.5, "sum"), "sum", WEIGHTINGS)


@graded("weighted_loss")
def test_weighted_loss_is_weight_times_mean_squared_x_error(pd):
    """the loss of an example is w(λ_t) times the mean over its pixels of (x - x̂)²; ε̂ plays no part"""
    for weighting, t in product(WEIGHTINGS, INNER):
        x, eps, z = example(t, 2, 3, 4)
        model = lambda z, t: (0.5 * x, eps + 7)
        close(pd.weighted_loss(model, x, z, t, weighting), ref.weighted_loss(model, x, z, t, weighting),
              f"the loss of two examples with {weighting!r} at t = {t:g}")


@graded("weighted_loss")
def test_weighted_loss_keeps_examples_apart(pd):
    """the loss of one example has nothing to do with the others in the batch, and each has its own t"""
    t = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    for shape in ((3,), (3, 2), (3, 1, 4, 4)):
        x, _, z = example(t, *shape)
        model = lambda z, t: (x + torch.arange(3.0).reshape(3, *[1] * (len(shape) - 1)), z)
        for weighting in ("constant", "snr"):
            close(pd.weighted_loss(model, x, z, t, weighting), ref.weighted_loss(model, x, z, t, weighting),
                  f"the {weighting!r} loss of three examples of shape {shape[1:]} at t = {listing(t)}, "
                  "where x̂ is wrong by 0, 1 and 2,", atol=1e-9)


@graded("ddim_step")
def test_ddim_step_keeps_x_and_eps(pd):
    """with the x and ε that z_t was made of, a step ends at the z_s that is made of the same x and ε"""
    for s in TIMES:
        x, eps, z = example(s, 2, 3)
        close(pd.ddim_step(x, eps, s), z, f"z_s at s = {s:g}")


@graded("ddim_step")
def test_ddim_step_is_equation_8(pd):
    """z_s is Equation 8's for any x̂ with ε̂ = (z_t - α_t x̂)/σ_t, for any shape, one s or one per example"""
    for t, s in ((1.0, 0.5), (0.5, 0.25), (torch.tensor([1.0, 0.5, 0.2]), torch.tensor([0.0, 0.3, 0.1]))):
        for shape in ((3,), (3, 2), (3, 1, 4, 4)):
            z, x_hat = normal(*shape), normal(*shape, seed=3)
            _, eps_hat = ref.to_x_eps(x_hat, z, t, "x")
            close(pd.ddim_step(x_hat, eps_hat, s), ref.ddim(x_hat, z, t, s),
                  f"z_s of shape {shape} for t = {t}, s = {s}", atol=1e-6)


@graded("ancestral_step")
def test_ancestral_step_has_the_mean_of_the_posterior(pd):
    """the mean of z_s is that of q(z_s | z_t, x = x̂), Equation 3"""
    for t, s in ((1.0, 0.5), (0.75, 0.5), (0.5, 0.25), (0.3, 0.1)):
        z, x_hat = torch.full((1, DRAWS), 0.8), torch.full((1, DRAWS), -0.5)
        mean, std = ref.ancestral(x_hat, z, t, s)
        close(pd.ancestral_step(x_hat, z, t, s).double().mean(), mean.mean(),
              f"the mean for z_t = 0.8, x̂ = -0.5, t = {t:g}, s = {s:g}", 0.005, 0.02 * std.item())


@graded("ancestral_step")
def test_ancestral_step_interpolates_the_log_variance(pd):
    """the deviation is the posterior's with noise_scale 0, the larger one of q(z_t | z_s) with 1, the
    default, and with 0.5 the log-variance is half way"""
    for noise_scale, (t, s) in product((0.0, 1.0, 0.5), ((1.0, 0.5), (0.75, 0.25), (0.3, 0.1))):
        z, x_hat = torch.full((1, DRAWS), 0.8), torch.full((1, DRAWS), -0.5)
        got = pd.ancestral_step(x_hat, z, t, s, *[noise_scale] * (noise_scale < 1)).double().std()
        close(got, ref.ancestral(x_hat, z, t, s, noise_scale)[1],
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
        z, (model, calls) = normal(2, 3), recorded(two_points)
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
            model = lambda z, t: end
            close(pd.heun_step(model, x, eps, z, t, s), ref.heun_step(model, x, eps, z, t, s),
                  f"z_s with {what} at the end, t = {t:g}, s = {s:g},")


@graded("sample")
def test_sample_visits_uniform_times_from_1_down(pd):
    """N steps ask the model at t = 1, 1 - 1/N, ..., 1/N, Heun also at the end of each step but the last;
    fewer steps than one and an unknown sampler are a ValueError"""
    for sampler, steps in product(SAMPLERS, (1, 2, 5)):
        model, calls = recorded(two_points)
        pd.sample(model, normal(2, 3), steps, sampler)
        clocks = [i / steps for i in range(steps, 0, -1)]
        if sampler == "heun":
            clocks = sorted(clocks + clocks[1:], reverse=True)
        times = listing(t for _, t in calls)
        check(times == listing(clocks), f"{sampler} with N = {steps} asks at {times or 'no time'}")
    refuses(lambda: pd.sample(two_points, normal(2, 3), 2, "euler"), "euler", SAMPLERS)
    refuses(lambda: pd.sample(two_points, normal(2, 3), 0), 0, ["1"])


@graded("sample")
def test_sample_with_ddim_and_heun_agrees_with_the_reference(pd):
    """N steps of DDIM or Heun end where N steps of Equation 8 or of the trapezoidal rule end"""
    for sampler, steps in product(("ddim", "heun"), (1, 2, 5, 16)):
        z, model = normal(2, 3), gaussian(0.3, 1.5)
        close(pd.sample(model, z, steps, sampler), ref.sample(model, z, steps, sampler),
              f"x after {steps} {sampler} steps")


@graded("sample")
def test_sample_clips_x_hat_and_moves_eps_hat_along(pd):
    """with clip, x̂ is held within [-1, 1] at every prediction, and ε̂ fits the clipped x̂ so that α_t x̂ +
    σ_t ε̂ = z_t"""
    for sampler, steps in product(("ddim", "heun"), (2, 5, 16, 1)):
        z, (model, calls), (same, expected) = 2 * normal(2, 3), *[recorded(gaussian(0.3, 1.5)) for _ in "ab"]
        got = pd.sample(model, z, steps, sampler, clip=True)
        right = ref.sample(same, z, steps, sampler, clip=True)
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


def landing_errors(pd, dtype, steps, substeps):
    """(by how much the student misses, how far the teacher moves) for all t = 1/N, ..., 1."""
    t = torch.arange(1, steps + 1, dtype=torch.float64) / steps
    z, teacher, s = normal(steps, 4).to(dtype), gaussian(0.3, 0.4), t - 1 / steps
    x_tilde = pd.distill_target(teacher, z, t.to(dtype), s.to(dtype), substeps)
    landing = ref.land(teacher, z.double(), t, s, substeps)
    return (ref.ddim(x_tilde, z, t, s) - landing).norm(dim=1), (landing - z).norm(dim=1)


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
def test_teacher_is_asked_at_the_start_of_each_substep(pd):
    """the teacher is asked once at the start of each of its steps, from t down towards s, each time where its
    last step has led it"""
    for substeps in (2, 3):
        z, (model, calls) = normal(2, 3), recorded(two_points)
        pd.distill_target(model, z, 0.9, 0.3, substeps)
        times = listing(t for _, t in calls)
        check(times == listing(0.9 - 0.6 * i / substeps for i in range(substeps)),
              f"with t = 0.9, s = 0.3 and substeps = {substeps} it is asked at {times}")
        close(calls[1][0], ref.land(two_points, z, 0.9, 0.9 - 0.6 / substeps, 1),
              f"its second z with substeps = {substeps}")


@graded("distill_target")
def test_x_tilde_of_a_teacher_that_never_changes_its_mind(pd):
    """a teacher that always predicts the same x̂ teaches just that x̂, be it within [-1, 1] or not"""
    for value, (t, s) in product((0.5, -3.0), ((1.0, 0.0), (1.0, 0.5), (0.25, 0.0))):
        close(pd.distill_target(always(value), normal(2, 3), t, s), value,
              f"x̃ for x̂ = {value:g}, t = {t:g}, s = {s:g}")


@graded("distill_target")
def test_x_tilde_agrees_with_algorithm_2(pd):
    """x̃ is Algorithm 2's for any shape, with one t and s or one for each example, and keeps its digits in
    float32 at both ends of time; fewer substeps than one are a ValueError"""
    functions, teacher, z = (pd.distill_target, ref.distill_target), gaussian(0.3, 0.4), normal(3, 1, 8, 8)
    clocks = (0.75, 0.25), (torch.tensor([0.25, 0.5, 1.0]).double(), torch.tensor([0.0, 0.25, 0.75]).double())
    for part, substeps, (t, s) in product((z, z[:, 0, 0, 0], z[..., 0, 0]), ([2], [], [1], [3]), clocks):
        got, expected = (f(teacher, part, t, s, *substeps) for f in functions)
        close(got, expected, f"x̃ of shape {tuple(part.shape)} with substeps = {listing(substeps) or '2'}")
    t = torch.tensor([1 / 8192, 0.5, 1.0])
    for step in (1 / 8192, 1 / 16384):
        got, expected = (f(two_points, z.float(), t, t - step) for f in functions)
        close(got, expected, f"x̃ for the float32 t = 1/8192, 0.5, 1 and s = t - 1/{1 / step:g}", atol=1e-4)
    refuses(lambda: pd.distill_target(teacher, z, 1.0, 0.5, 0), 0, ["1"])


@graded("train")
def test_student_trains_at_the_times_its_sampler_visits(pd):
    """a student of N steps trains at t = 1/N, 2/N, ..., 1, at all of them and at no others"""
    for steps in (1, 4):
        seen = pd.watch_training(DATA, 20, teacher=two_points, steps=steps, batch_size=32)
        times = listing(torch.cat([t for _, _, t in seen]).unique())
        clocks = listing(i / steps for i in range(1, steps + 1))
        check(times == clocks, f"with N = {steps} its times are {times}")


@graded("train")
def test_student_learns_what_its_teacher_says(pd):
    """a student learns from its teacher alone: one that always says 2 teaches 2, whatever the data are"""
    for target, _, _ in pd.watch_training(DATA, 2, teacher=always(2.0), steps=4, batch_size=16):
        close(target, 2.0, "the target for data that are all 0.5", 1e-4)


@graded("train")
def test_student_target_is_x_tilde_of_its_own_step(pd):
    """the target at t is the x̃ of the student's step, from t to t - 1/N, with the given substeps"""
    for steps, substeps in ((4, 2), (4, 3), (1, 2)):
        teacher, calls = recorded(gaussian(0.3, 0.4))
        seen = pd.watch_training(DATA, 3, teacher=teacher, steps=steps, substeps=substeps, batch_size=32)
        times = listing(sorted({round(t.item(), 3) for _, ts in calls for t in ts}))
        check(times == listing(round(i / (steps * substeps), 3) for i in range(1, steps * substeps + 1)),
              f"with N = {steps} and substeps = {substeps} the teacher is asked at {times}")
        for target, z, t in seen:
            close(target, ref.distill_target(teacher, z, t, t - 1 / steps, substeps),
                  f"the target with N = {steps} and substeps = {substeps}", 1e-3, 1e-4)


@graded("train")
def test_z_is_made_of_data_and_noise(pd):
    """student and teacher see z = α_t x + σ_t ε of the data, and for a teacher all is as before: t anywhere
    in (0, 1), and the data as target"""
    for who, options in (("student", {"teacher": two_points, "steps": 4}), ("teacher", {})):
        seen = pd.watch_training(DATA, 30, batch_size=128, **options)
        target, z, t = (torch.cat(column).double() for column in zip(*seen))
        a, s, _ = ref.at(z, t)
        eps = (z - 0.5 * a) / s
        for what, got, expected in ("mean", eps.mean(), 0.0), ("deviation", eps.std(), 1.0):
            close(got, expected, f"the {what} of (z - α_t x)/σ_t for a {who}", atol=0.06)
        if who == "teacher":
            close(target, 0.5, "the target of a teacher for data that are all 0.5")
            check(len(t.unique()) > 3000 and t.min() < 0.05 and t.max() > 0.95, f"the t are {listing(t)}")


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


# ------------------------------------------------------------------------------------------------------------
# 3. More mathematics: closed forms, the ends of time, the training loop
# ------------------------------------------------------------------------------------------------------------
def load(source):
    """A module made of the text of pd.py, which `import` knows nothing of."""
    module = types.ModuleType("pd")
    exec(compile(source, "pd.py", "exec"), vars(module))
    module.watch_training = partial(watch_training, module)
    return module


def watch_training(pd, data, updates, **options):
    """Every (x_target, z, t) that `train` hands to `weighted_loss`, for a model of one parameter."""
    class Toy(torch.nn.Linear):
        def forward(self, z, t):
            return z * self.weight.sum(), z

    def watched(model, x_target, z, t, weighting):
        seen.append([x_target.detach().clone(), z.detach().clone(), t.detach().clone()])
        return model(z, t)[0].flatten(1).mean(1)

    seen, original = [], pd.weighted_loss
    pd.weighted_loss = watched
    try:
        pd.train(Toy(1, 1), data, updates, **options)
    finally:
        pd.weighted_loss = original
    return seen


@pytest.fixture(scope="session")
def source():
    return OFFICIAL.read_text(encoding="utf8")


@pytest.fixture(name="pd", scope="session")
def official(source):
    return load(source)


def test_v_is_the_velocity_on_the_circle(pd):
    """v = dz/dφ where φ is the angle of (α, σ), by a central difference."""
    x, eps = normal(3, 2, seed=1), normal(3, 2, seed=2)
    for t in INNER:
        (a0, s0), (a1, s1) = pd.alpha_sigma(t - 1e-5), pd.alpha_sigma(t + 1e-5)
        v = ((a1 - a0) * x + (s1 - s0) * eps) / (torch.atan2(s1, a1) - torch.atan2(s0, a0))
        for got, expected in zip(pd.to_x_eps(v, ref.noisy(x, eps, t), t, "v"), (x, eps)):
            close(got, expected, f"t = {t}", 1e-6, 1e-7)


def test_both_trusts_x_in_the_noise_and_eps_near_the_data(pd):
    """x̂ is the mean of what x̃ and what ε̃ says, with weights σ² and α²."""
    z, out = normal(2, 3), normal(2, 6, seed=3)
    for t in INNER:
        a, s = ref.alpha_sigma(t)
        by_x, by_eps = pd.to_x_eps(out[:, :3], z, t, "x")[0], pd.to_x_eps(out[:, 3:], z, t, "eps")[0]
        close(pd.to_x_eps(out, z, t, "both")[0], s**2 * by_x + a**2 * by_eps, f"t = {t}")


@pytest.mark.parametrize("param", PARAMS)
def test_to_x_eps_in_float32_over_all_of_time(pd, param):
    """Finite everywhere, and exact where x̂ from ε is not amplified by σ/α, nor ε̂ from x by α/σ."""
    t = torch.tensor(TIMES)
    z, out = normal(len(t), 2, 4).float(), normal(len(t), 4 if param == "both" else 2, 4, seed=3).float()
    for got, expected in zip(pd.to_x_eps(out, z, t, param), ref.to_x_eps(out, z, t, param)):
        assert got.dtype == torch.float32 and got.isfinite().all()
        exact = slice(len(INNER) if param in ("eps", "x") else None)
        close(got[exact], expected[exact], param, 1e-5, 2e-6)


def test_a_float_t_leaves_the_type_of_z_alone(pd):
    for dtype, param in product((torch.float32, torch.float64), PARAMS):
        z, out = normal(2, 2).to(dtype), normal(2, 4 if param == "both" else 2).to(dtype)
        x_hat, eps_hat = pd.to_x_eps(out, z, 0.3, param)
        got = [x_hat, eps_hat, pd.ddim_step(x_hat, eps_hat, 0.2), pd.ancestral_step(x_hat, z, 0.3, 0.2),
               pd.heun_step(two_points, x_hat, eps_hat, z, 0.3, 0.2), pd.sample(two_points, z, 3),
               pd.weighted_loss(two_points, z, z, 0.3, "snr"), pd.distill_target(two_points, z, 0.3, 0.2)]
        assert {g.dtype for g in got} == {dtype}


def test_denoiser_gives_the_network_a_clock_per_example(pd):
    z = normal(2, 3).float()
    for t in (0.25, torch.tensor(0.25), torch.tensor([0.25, 0.5])):
        net, calls = recorded(lambda z, t: 0.3 * z)
        for got, expected in zip(pd.Denoiser(net, "x")(z, t), ref.to_x_eps(0.3 * z, z, t, "x")):
            close(got, expected, f"t = {t}")
        clock = calls[0][1]
        assert clock.shape == (2,) and clock.dtype == z.dtype and clock[0] == 0.25


def test_unknown_params_are_refused_with_what_would_be_right(pd):
    assert (pd.PARAMS, tuple(pd.WEIGHTINGS), pd.SAMPLERS) == (PARAMS, WEIGHTINGS, SAMPLERS)
    refuses(lambda: pd.to_x_eps(normal(2, 3), normal(2, 3), 0.5, "velocity"), "velocity", PARAMS)
    refuses(lambda: pd.Denoiser(torch.nn.Identity(), "velocity"), "velocity", PARAMS)


@pytest.mark.parametrize("param, weighting", list(product(PARAMS, WEIGHTINGS)))
def test_losses_of_every_param_and_weighting(pd, param, weighting):
    """In continuous time and for N = 1, 4, 8: 1e-5 away from the ends, in float32 too; finite at the ends."""
    clocks = [torch.arange(1, N + 1) / N for N in (1, 4, 8)] + [torch.tensor(TIMES)]
    for t in [torch.rand(64, generator=torch.Generator().manual_seed(0)), *clocks]:
        (x, eps, z), wrong = example(t, len(t), 2, 4), normal(len(t), 2, 4, seed=3)
        wrong = torch.cat([wrong, -wrong], 1) if param == "both" else wrong
        out = ref.exact_output(x, eps, t, param) + wrong
        expected = ref.weighted_loss(lambda z, t: ref.to_x_eps(out, z, t, param), x, z, t, weighting)
        model = pd.Denoiser(lambda z, t: out.to(z), param)
        close(pd.weighted_loss(model, x, z, t.double(), weighting), expected, "in float64", 1e-5, 1e-12)
        loss, inner = pd.weighted_loss(model, x.float(), z.float(), t, weighting), (t - 0.5).abs() <= 0.4
        assert loss.shape == t.shape and loss.dtype == torch.float32 and loss.isfinite().all()
        close(loss[inner], expected[inner], "in float32", 1e-5)


def test_default_weighting_teaches_a_one_step_student(pd):
    """All that such a student does is at t = 1, where the SNR is e^-20."""
    assert pd.loss_weight(1.0, "snr") < 1e-8
    for weighting in (pd.COMMON["weighting"], inspect.signature(pd.train).parameters["weighting"].default):
        assert pd.loss_weight(1.0, weighting) >= 1


@pytest.mark.parametrize("clip", (False, True))
def test_ddim_in_float32_agrees_with_the_reference(pd, clip):
    for steps, teacher in product((1, 2, 5, 16), (two_points, gaussian(0.3, 1.5))):
        z = normal(4, 1, 8, 8).float()
        close(pd.sample(teacher, z, steps, clip=clip), ref.sample(teacher, z, steps, clip=clip),
              f"x after {steps} steps", atol=1e-5)


def test_ancestral_step_with_the_same_noise(pd):
    """Its mean is linear in z_t and x̂ with the posterior's coefficients, and std(½)² = std(0) std(1)."""
    def step(x_hat, z, noise_scale):
        torch.manual_seed(0)
        return pd.ancestral_step(x_hat, z, 0.7, 0.4, noise_scale)
    z, x_hat, zero = normal(3, 2), normal(3, 2, seed=3), torch.zeros(3, 2).double()
    low, middle, high = (step(zero, zero, noise_scale) for noise_scale in (0.0, 0.5, 1.0))
    close(step(x_hat, z, 0.0) - low, ref.ancestral(x_hat, z, 0.7, 0.4)[0], "the mean", 1e-9)
    close(high / low, (ref.alpha_sigma(0.7)[1] / ref.alpha_sigma(0.4)[1]).item(), "σ_t/σ_s", 1e-9)
    close(middle**2, low * high, "the geometric mean", 1e-9)


@pytest.mark.parametrize("substeps", (2, 3, 4, 8))
def test_landing_for_every_number_of_student_steps(pd, substeps):
    """In float64 within 1e-5 of the distance moved; in float32 within 1e-5 outright, which is a few roundings
    of z."""
    for steps in range(1, 129):
        miss, moved = landing_errors(pd, torch.float64, steps, substeps)
        assert (miss <= 1e-5 * moved).all()
        assert landing_errors(pd, torch.float32, steps, substeps)[0].max() <= 1e-5


def test_second_prediction_of_the_teacher_is_not_the_target(pd):
    """The known mistake misses the landing by some per cent of the distance moved, and x̃ by nothing."""
    teacher, z, t, s = gaussian(0.3, 0.4), normal(64, 2), 0.75, 0.5
    landing, middle = ref.land(teacher, z, t, s, 2), (t + s) / 2
    second, _ = teacher(ref.land(teacher, z, t, middle, 1), middle)
    wrong, right = ((ref.ddim(x, z, t, s) - landing).norm() / (landing - z).norm()
                    for x in (second, pd.distill_target(teacher, z, t, s)))
    assert wrong > 0.005 and right < 1e-9


def test_only_the_loss_has_a_gradient(pd):
    x, z = torch.ones(2, 3, requires_grad=True), normal(2, 3)
    model = lambda z, t: (x * 0.5, x * z)
    assert not pd.distill_target(model, z, 0.5, 0.2).requires_grad
    assert not pd.sample(model, z, 2).requires_grad
    assert pd.weighted_loss(model, z, z, 0.5, "snr").sum().requires_grad


@pytest.mark.parametrize("mean, variance", ((0.0, 1.0), (0.7, 0.1), (-2.0, 4.0)))
def test_gaussian_data_have_a_known_flow(pd, mean, variance):
    """DDIM converges to the exact map at first order, Heun at second."""
    z, model = normal(50, 1), gaussian(mean, variance)
    exact = gaussian_path(z, 1.0, 0.0, mean, variance)
    for sampler, order in ("ddim", 1), ("heun", 2):
        coarse, fine = ((pd.sample(model, z, n, sampler) - exact).abs().max().item() for n in (128, 256))
        assert fine < 0.1 and abs(math.log2(coarse / fine) - order) < 0.25


@pytest.mark.parametrize("noise_scale", (0.0, 0.5, 1.0))
def test_ancestral_sampler_of_gaussian_data_has_the_right_mean_and_variance(pd, noise_scale):
    """x̂ is linear, z_s = a z_t + b + noise: the moments follow a recursion that ends at the data's."""
    def moments(steps):
        m, v, points, model = 0.0, 1.0, torch.tensor([[0.0], [1.0]]).double(), gaussian(0.7, 0.3)
        for i in range(steps, 0, -1):
            t, s = i / steps, (i - 1) / steps
            ends, std = ref.ddim(model(points, t)[0], points, t, s), 0.0
            if s > 0:
                ends, std = ref.ancestral(model(points, t)[0], points, t, s, noise_scale)
            b, a = ends[0].item(), (ends[1] - ends[0]).item()
            m, v = a * m + b, a**2 * v + float(std)**2
        return m, v
    torch.manual_seed(1)
    x = pd.sample(gaussian(0.7, 0.3), torch.randn(1, 40_000), 8, "ancestral", noise_scale=noise_scale)
    (m, v), (m_end, v_end) = moments(8), moments(1000)
    assert abs(x.mean() - m) < 0.02 and abs(x.var() / v - 1) < 0.05
    assert abs(m_end - 0.7) < 0.01 and abs(v_end - 0.3) < 0.01


def test_student_fitted_to_x_tilde_equals_the_two_step_teacher(pd):
    """For Gaussian data x̃ is linear in z, so least squares finds it: one step is two of the teacher."""
    teacher, z, fresh, t, s = gaussian(0.7, 0.3), normal(200, 1), normal(50, 1, seed=9), 0.5, 0.25
    line = lambda z: torch.cat([z, torch.ones_like(z)], 1)
    weights = torch.linalg.lstsq(line(z), pd.distill_target(teacher, z, t, s)).solution
    x_hat, eps_hat = pd.to_x_eps(line(fresh) @ weights, fresh, t, "x")
    close(pd.ddim_step(x_hat, eps_hat, s), ref.land(teacher, fresh, t, s, 2), "the landing", 1e-9, 1e-9)


def test_two_point_data_are_sampled_at_their_points(pd):
    """x = ±1: x̂ = tanh(α z/σ²) by Bayes (two bells at ±α), and DDIM ends at the sign of its noise."""
    z = normal(200, 1)
    for t in INNER:
        a, s = ref.alpha_sigma(t)
        plus, minus = (torch.exp(-(z - a * x)**2 / (2 * s**2)) for x in (1, -1))
        close(two_points(z, t)[0], (plus - minus) / (plus + minus), f"E[x | z] at t = {t}", 1e-6, 1e-6)
    for sampler in SAMPLERS:
        close(pd.sample(two_points, z, 64, sampler).abs(), 1.0, f"|x| of {sampler}", atol=1e-3)
    close(pd.sample(two_points, z, 64), z.sign(), "x of ddim", atol=1e-3)


def trained(pd, updates, **options):
    """(b of the model x̂ = a z + b in the end, b after every update, rows, whether dropout was on)."""
    class Line(torch.nn.Linear):
        def forward(self, z, t):
            modes.append(self.training)
            return self.weight.sum() * z + self.bias, z
    model, values, modes = Line(1, 1), [], []
    torch.nn.init.zeros_(model.bias)
    rows = pd.train(model, DATA, updates, every=1, batch_size=8,
                    report=lambda state: values.append(model.bias.item()), **options)
    return model.bias.item(), values, rows, modes


def test_teacher_warms_up_and_ends_as_the_moving_average_of_its_weights(pd):
    b, values, rows, modes = trained(pd, 30, ema=0.9, lr=0.05, warmup=4)
    average = 0.0
    for n, value in enumerate(values, 1):
        decay = min(0.9, n / (n + 9))                                   # a short memory at first
        average = decay * average + (1 - decay) * value
    assert abs(b - average) < 1e-6 < abs(b - values[-1]) and all(modes)
    close(torch.tensor([row["lr"] for row in rows[:6]]), torch.tensor([1, 2, 3, 4, 4, 4]) / 80, "the rate")


def test_student_learns_without_dropout_and_ends_as_it_is(pd):
    b, values, rows, modes = trained(pd, 10, teacher=two_points, steps=4, lr=0.05)
    assert b == values[-1] and not any(modes)
    close(torch.tensor([row["lr"] for row in rows]), torch.linspace(0.05, 0.005, 10), "the falling rate")


def test_one_step_student_learns_what_its_teacher_says(pd):
    b, _, rows, _ = trained(pd, 300, teacher=always(0.8), steps=1, lr=0.05)
    assert abs(b - 0.8) < 0.02 and rows[-1]["loss"] < 1e-3 < rows[0]["loss"]


def test_pictures_become_numbers_from_minus_1_to_1(pd):
    pictures = torch.tensor([[[[0, 255]]]], dtype=torch.uint8)
    assert (pd.draw(pictures, 50, flip=False) == torch.tensor([-1.0, 1.0])).all()
    assert 0 < (pd.draw(pictures, 50, flip=True)[..., 0] == 1).sum() < 50


# ------------------------------------------------------------------------------------------------------------
# 4. Classroom kit: hand it out, grade it, hunt the bug
#
# A submission is graded in child processes that know no test and no reference: the tests run here, and what
# they call of `pd` goes through a Wire to the child, as tensors and names. A submission can only answer;
# nothing that it prints, patches or imports changes what is asked and compared. A guard also keeps it from
# the solution's file, writing and other programs. Enough for a class; for malice use a container.
# ------------------------------------------------------------------------------------------------------------
def blocks(top, name):
    """The parts of a module's statements that exercise `name` is about: lists of consecutive statements."""
    functions = {node.name: node for node in top if isinstance(node, ast.FunctionDef)}

    def branch(function, wanted):
        """The one branch of an if, in this function, for which wanted(its condition, its text) holds."""
        found = [block for node in ast.walk(functions[function]) if isinstance(node, ast.If)
                 for block, condition in ((node.body, ast.unparse(node.test)), (node.orelse, ""))
                 if wanted(condition, "\n".join(map(ast.unparse, block)))]
        assert len(found) == 1, f"{len(found)} places in {function} for exercise {name}"
        return found[0]
    if name in PARAMS:
        return [branch("to_x_eps", lambda condition, _: condition == f"param == {name!r}")]
    if name == "train":
        return [branch("train", lambda _, text: text.startswith("t = ") and "randint(" in text),
                branch("train", lambda _, text: "distill_target(" in text)]
    body = functions[name].body[1:]                                     # without the docstring
    if name == "loss_weight":
        (table,) = [node for node in top if ast.unparse(node).startswith("WEIGHTINGS = ")]
        return [[table], body]
    return [body]


def handout(source, names=tuple(EXERCISES)):
    """`source` with the blocks of these exercises taken out."""
    lines, top, cuts = source.splitlines(), ast.parse(source).body, []
    for name in names:
        number = list(EXERCISES).index(name) + 1
        for block in blocks(top, name):
            todo = f'raise NotImplementedError("exercise {number}: {EXERCISES[name]}")'
            if block[0] in top:
                todo = f"WEIGHTINGS = dict.fromkeys({WEIGHTINGS})  # exercise {number}: functions of the SNR"
            cuts.append((block[0].lineno - 1, block[-1].end_lineno, " " * block[0].col_offset + todo))
    for first, last, todo in sorted(cuts, reverse=True):
        lines[first:last] = [todo]
    return "\n".join(lines) + "\n"


class Stopped(BaseException):
    """The other process has ended."""


class Wire:
    """Calls of functions in another process. What crosses it: numbers, text, tensors, names of functions."""

    def __init__(self, connection, functions):
        self.connection, self.functions = connection, functions
        self.why = "the program ends, by an exit or a crash"

    def send(self, *message):
        file = io.BytesIO()
        torch.save(message, file)
        try:
            self.connection.send_bytes(file.getvalue())
        except OSError:
            raise Stopped(self.why) from None

    def receive(self):
        try:
            message = self.connection.recv_bytes(2**26)
        except (OSError, EOFError):
            raise Stopped(self.why) from None
        return torch.load(io.BytesIO(message), map_location="cpu", weights_only=True)

    def pack(self, value):
        if isinstance(value, (list, tuple)):
            return [self.pack(v) for v in value]
        if isinstance(value, torch.Tensor):
            return value.detach().clone().contiguous()
        if callable(value):
            name = f"function {len(self.functions)}"
            self.functions[name] = value
            return {"function": name}
        return value if isinstance(value, (int, float, str)) else None

    def unpack(self, value):
        if isinstance(value, list):
            return [self.unpack(v) for v in value]
        if isinstance(value, dict):
            return partial(self.call, value["function"])
        if torch.is_tensor(value) and (value.layout != torch.strided or value.numel() > 2**22):
            raise ValueError(f"a tensor of shape {tuple(value.shape)} is out of all bounds")
        return value

    def call(self, name, *args, **kwargs):
        """The other side's function; it may call ours before it answers."""
        self.send("call", name, self.pack(args), {key: self.pack(value) for key, value in kwargs.items()})
        while (message := self.receive())[0] == "call":
            self.answer(*message[1:])
        if message[0] == "return":
            return self.unpack(message[1])
        error, text = message[1:]
        known = {"NotImplementedError": NotImplementedError, "ValueError": ValueError}
        raise known.get(error, RuntimeError)(text if error in known else f"{error}: {text}")

    def answer(self, name, args, kwargs):
        try:
            kwargs = {key: self.unpack(value) for key, value in kwargs.items()}
            reply = "return", self.pack(self.functions[name](*self.unpack(args), **kwargs))
        except Stopped:
            raise
        except BaseException as error:
            reply = "error", type(error).__name__, str(error)[:500]
        self.send(*reply)


def serve(connection, forbidden):
    """The child: takes a submission, and calls its functions as it is told."""
    denied = ("os.fork", "os.exec", "os.posix_spawn", "os.system", "os.kill", "os.remove", "os.rename",
              "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "shutil.", "subprocess.",
              "ctypes.", "socket.connect", "signal.")

    def guard(event, args):
        is_file = event == "open" and isinstance(args[0], (str, bytes))
        path = os.path.realpath(os.fsdecode(args[0])) if is_file else ""
        if event.startswith(denied) or path.startswith(("/proc/", *forbidden)):
            raise PermissionError(f"{event} {path} is not for submissions")

    def start(source, given):
        module = load(source)
        for name in given:                      # the other exercises, which the grader computes
            setattr(module, name, partial(wire.call, name))
        wire.functions.update((name, value) for name, value in vars(module).items() if callable(value))

    wire = Wire(connection, {"start": start})
    wire.send(os.getpid())
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))                   # no file grows
    resource.setrlimit(resource.RLIMIT_DATA, (2**33, 2**33))
    sys.addaudithook(guard)
    while True:
        wire.answer(*wire.receive()[1:])


def nursery(address, forbidden):
    """A process that has imported torch and nothing of ours, and becomes a child for each connection."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    torch.set_num_threads(1)
    torch.optim.Adam([torch.zeros(1, requires_grad=True)]).step()       # its late imports, for all children
    server = socket.socket(socket.AF_UNIX)
    server.bind(address)
    server.listen()
    while 0 not in select.select([server, 0], [], [])[0]:               # until the grader closes our input
        connection = Connection(server.accept()[0].detach())
        if os.fork() == 0:
            try:
                server.close()
                serve(connection, forbidden)
            finally:
                os._exit(0)
        connection.close()


NURSERY = "\n\n".join([
    "import io, os, resource, select, signal, socket, sys, types, numpy, torch, torch.distributed, tqdm",
    "import torch.utils.flop_counter", "from functools import partial",
    "from multiprocessing.connection import Connection",
    *map(inspect.getsource, (load, watch_training, Stopped, Wire, serve, nursery)),
    "nursery(sys.argv[1], sys.argv[2:])"])


def given(name):
    """What exercise `name` may build on: the reference's functions for all others, in the types of pd.py."""
    def in_its_type(function):
        def answer(*args, **kwargs):
            dtype = next((a.dtype for a in args if torch.is_tensor(a)), torch.float64)
            result = function(*args, **kwargs)
            return result.to(dtype) if torch.is_tensor(result) else [r.to(dtype) for r in result]
        return answer
    others = {"to_x_eps", *EXERCISES} - {*PARAMS, "train", "to_x_eps" if name in PARAMS else name}
    return {other: in_its_type(getattr(ref, other)) for other in sorted(others)}


def tidy(error):
    return "".join(c if c.isprintable() else " " for c in " ".join(str(error).split()))[:400]


def score(pd, name):
    """[(test, what is wrong or None)] for one exercise."""
    results = []
    for test, arguments in GRADED[name]:
        what, failure = " ".join(inspect.getdoc(test).split()), None
        try:
            test(pd, **arguments)
        except NotImplementedError as error:
            failure = f"not filled in yet: {tidy(error)}"
        except Wrong as error:
            failure = f"{what}: {tidy(error)}"
        except Stopped as error:                                        # neither can the rest be asked
            return results + [(test.__name__, f"{what}: {error}") for test, _ in GRADED[name][len(results):]]
        except Exception as error:
            failure = f"{what}: it fails with {tidy(error if type(error) is RuntimeError else repr(error))}"
        results.append((test.__name__, failure))
    return results


class Grader:
    """`with Grader() as grader: grader.grade(source)`. Every exercise has a process of its own."""

    def __init__(self, seconds=10):
        self.seconds = seconds

    def __enter__(self):
        self.folder = tempfile.TemporaryDirectory()
        self.address = os.path.join(self.folder.name, "socket")
        forbidden = str(OFFICIAL), os.path.realpath(__file__), str(OFFICIAL.with_name("__pycache__"))
        self.process = subprocess.Popen([sys.executable, "-c", NURSERY, self.address, *forbidden],
                                        cwd=self.folder.name, env={**os.environ, "OMP_NUM_THREADS": "1"},
                                        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait()
        self.folder.cleanup()

    def connect(self):
        while self.process.poll() is None:
            try:
                line = socket.socket(socket.AF_UNIX)
                line.connect(self.address)
                return Connection(line.detach())
            except OSError:                                             # not born yet
                time.sleep(0.1)
        raise OSError("the grader's process did not start: does `import torch` work?")

    def exercise(self, source, name):
        connection = self.connect()
        wire = Wire(connection, given(name))
        (child,) = wire.receive()

        def end(why):
            wire.why = why
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        timer = threading.Timer(self.seconds, end, ["it takes too long: an endless loop?"])
        timer.start()
        try:
            wire.call("start", source, list(wire.functions))
            names = [*given("train"), "train", "watch_training"]
            return score(types.SimpleNamespace(**{f: partial(wire.call, f) for f in names}), name)
        except (Exception, Stopped) as error:
            return [(test.__name__, f"the file can't be imported: {tidy(error)}") for test, _ in GRADED[name]]
        finally:
            timer.cancel()
            end("it is graded")
            connection.close()

    def grade(self, source, names=tuple(EXERCISES)):
        with ThreadPoolExecutor(2) as pool:
            return dict(zip(names, pool.map(partial(self.exercise, source), names)))


def report(file, results):
    """The table of one submission."""
    lines = [str(file), f"{'exercise':21}{'points':9}passed"]
    for name, tests in results.items():
        passed = [test.removeprefix("test_").replace("_", " ") for test, failure in tests if not failure]
        number, points = list(EXERCISES).index(name) + 1, f"{len(passed)}/{len(tests)}"
        lines += textwrap.wrap(f"{number:2}  {name:17}{points:9}" + "; ".join(passed), 110,
                               subsequent_indent=" " * 30)
        for failure in dict.fromkeys(failure for _, failure in tests if failure):
            lines += textwrap.wrap(failure, 110, initial_indent="      - ", subsequent_indent="        ")
    points = [not failure for tests in results.values() for _, failure in tests]
    return "\n".join([*lines, f"{'all':21}{sum(points)}/{len(points)}"])


def grade_files(files, json_file):
    sources, everything = [Path(file).read_text(encoding="utf8") for file in files], []
    with Grader() as grader:
        for file, source in zip(files, sources):
            results = grader.grade(source)
            print(report(file, results), flush=True)
            exercises = {name: {"points": list(dict(tests).values()).count(None), "of": len(tests),
                                "tests": dict(tests)} for name, tests in results.items()}
            everything.append({"file": file, "exercises": exercises})
    if json_file:
        Path(json_file).write_text(json.dumps(everything, indent=1, ensure_ascii=False), encoding="utf8")


# (what is replaced by what, the symptom, what it is and why, the test that catches it)
HUNTS = [
    ([("return x_tilde / (alpha_over_sigma(s) - alpha_over_sigma(t))", "return x_hat")],
     "Training looks fine, but every student is a little worse than it should be, stage by stage.",
     "distill_target returns the teacher's second prediction instead of x̃. One DDIM step with it misses "
     "the teacher's landing point by some per cent of the way, in every stage.",
     "test_one_student_step_lands"),
    ([("(t * (substeps - i) + s * i)", "(t * i + s * (substeps - i))")],
     "From the first stage on the students draw noise.",
     "The teacher's times are exchanged: it walks from s up to t, not from t over t' down to t''.",
     "test_teacher_is_asked"),
    ([('weighting="truncated", batch', 'weighting="snr", batch'),
      ('weighting="truncated", seed', 'weighting="snr", seed')],
     "Students of many steps are good, those of few steps bad, and the one-step student hardly learns.",
     "Training weights the x-error with the SNR. It is e^-20 at t = 1, the only time at which a one-step "
     "student works: there no error costs anything. The truncated weight max(SNR, 1) does not vanish.",
     "test_default_weighting_teaches"),
    ([("snr.clamp(min=1)", "snr.clamp(max=1)")],
     "The loss is far smaller than it was, and the one-step student hardly learns.",
     "The truncated weight is min(SNR, 1), not max(SNR, 1): it vanishes where there is most noise.",
     "test_truncated_weight"),
    ([("        x_hat, eps_hat = teacher(z, start)\n",
       "        x_hat, eps_hat = teacher(z, start)\n        x_hat = x_hat.clamp(-1, 1)\n")],
     "The students' pictures drift away from the teacher's, and their contrast is weaker.",
     "The teacher is clipped inside distill_target, so the students learn a path that the teacher does not "
     "take. x̃ is no picture and may lie outside [-1, 1].", "test_x_tilde_of_a_teacher_that_never"),
    ([("        return alpha / sigma\n", "        return sigma / alpha\n")],
     "Students draw something quite unlike their teacher, already after the first stage.",
     "The wrong ratio of σ: z/σ moves along α/σ with slope x̂, so the teacher's predictions are weighted by "
     "the changes of α/σ, not of σ/α.", "test_one_student_step_lands"),
    ([("torch.randint(1, steps + 1,", "torch.randint(0, steps,")],
     "The students' loss is millions of times what it was, and the one-step student draws noise.",
     "The discrete clock is off by one: t = 0, ..., 1 - 1/N, not 1/N, ..., 1. The student never sees t = 1, "
     "where its sampler starts, and its step from t = 0 would end before 0.",
     "test_student_trains_at_the_times"),
    ([("p.copy_(a)", "a.copy_(p)")],
     "The teacher is worse than it should be, and how much so depends on when its training stops.",
     "The average is kept and then forgotten: the weights are copied into it, not it into the weights.",
     "test_teacher_warms_up_and_ends_as"),
    ([("return alpha * z - sigma * out, sigma * z + alpha * out",
       "return sigma * z - alpha * out, alpha * z + sigma * out")],
     "The loss is huge, and all samples are noise.",
     "α and σ are exchanged in v = α ε - σ x. At t = 0, where α = 1, x̂ must be z.",
     "test_at_the_ends_of_time"),
    ([("for i in range(steps, 0, -1):", "for i in range(steps, 1, -1):")],
     "Pictures keep some noise, the more the fewer the steps; with one step they are nothing but noise.",
     "The sampler is one step short: it ends at t = 1/N, not at 0.", "test_sample_visits_uniform"),
    ([("(torch.exp(log_snr(t)))", "((1 - torch.as_tensor(t)) / t)")],
     "The teacher's loss is much smaller than other people's, and its pictures lack fine detail.",
     "The weights are made of t instead of its log-SNR: (1 - t)/t is taken for α²/σ². Both are 1 at t = "
     "1/2, but near the data the SNR is far larger.", "test_loss_weights_make_the_eps_loss"),
    ([("t = torch.randint(1, steps + 1, (batch_size,), device=x.device) / steps",
       "t = torch.rand(batch_size, device=x.device).clamp(min=1 / steps)")],
     "Students need more updates than they should: with few updates they lag further and further behind.",
     "The student's clock is continuous. Its sampler only ever visits t = 1/N, ..., 1; what it learns "
     "between them is wasted.", "test_student_trains_at_the_times"),
    ([("x = distill_target(", "x_tilde = distill_target(")],
     "Students of few steps draw blurs, no better than the teacher with so few steps.",
     "x̃ is computed and never used: the student still learns to predict the data, and the mean of all x "
     "that fit z is a blur.", "test_student_learns_what_its_teacher_says"),
    ([('to_x_eps(x_hat.clamp(-1, 1), z, t, "x") if clip else (x_hat, eps_hat)',
       "(x_hat.clamp(-1, 1) if clip else x_hat), eps_hat")],
     "With clip=True pictures are worse than without it.",
     "x̂ is clipped and ε̂ stays as it was, so the two do not add up to z any more.",
     "test_sample_clips_x_hat"),
    ([("sigma_s**(1 - noise_scale) * sigma_t**noise_scale",
       "sigma_t**(1 - noise_scale) * sigma_s**noise_scale")],
     "The ancestral sampler's pictures are smooth with noise_scale=1 and rough with 0: the knob turns the "
     "wrong way.",
     "The bounds of the variance are exchanged: σ_s makes the lower one (0), σ_t the upper one (1).",
     "test_ancestral_step_interpolates"),
    ([('sampler == "ddim" or s == 0', 'sampler == "ddim"')],
     "The ancestral sampler's pictures are covered with noise, the more the fewer the steps; DDIM's are "
     "clean.",
     "The last step is not DDIM's any more: the ancestral sampler adds noise that nothing will remove (and "
     "Heun asks for a prediction at t = 0, where there is none to be had).", "test_sample_ancestral_draws"),
    ([("torch.sin(FIRST_ANGLE + span * (1 - t)), ", "torch.cos(FIRST_ANGLE + span * t), ")],
     "Nothing is to be seen in pictures, but near t = 1 α and SNR are off by parts in a thousand on float32 "
     "clocks.",
     "α_t is the cosine of an angle near π/2. A float32 knows the angle to 1e-7 and α_1 is 4.5e-5, so few "
     "of its digits are right. The sine of the complement has them all.",
     "test_alpha_sigma_keep_their_digits"),
    ([("1000 * t[:, None]", "t[:, None]")],
     "Everything runs, and every model is a little blurred: the network hardly knows the time.",
     "The factor of 1000 is missing: t in [0, 1] turns the fastest cosine by one radian and the others "
     "hardly at all.", "test_time_embedding_has_frequencies"),
    ([(".reshape(len(z), -1).mean(1)", ".mean()")],
     "The teacher's loss jumps from update to update, and training is slow.",
     "The error is averaged over the batch before it is weighted: the large weights near t = 0 multiply the "
     "large errors of other examples, at large t.", "test_weighted_loss_keeps_examples_apart"),
    ([("distill_target(teacher, z, t, t - 1 / steps,", "distill_target(teacher, z, t, t - 0.5 / steps,")],
     "Students drift away from their teachers from the first stage on, more with every stage.",
     "x̃ is made for a step of 1/(2N), the teacher's, but the student of N steps goes 1/N at once.",
     "test_student_target_is_x_tilde"),
    ([("model.train(teacher is None)", "model.train()")],
     "With dropout (the preset of cifar10) students are a little blurred; with digits nothing is to be "
     "seen.",
     "Dropout stays on while students learn. They copy a deterministic map, which noise in the network can "
     "only blur.", "test_student_learns_without_dropout"),
    ([("x.float() / 127.5 - 1", "x.float() / 255")],
     "Pictures come out pale.",
     "The data run from 0 to 1, but noise and everything that turns samples back into pictures expect -1 to "
     "1.", "test_pictures_become_numbers"),
]


def plant(source, replacements):
    """`source` with each of these fragments, which is there once, replaced."""
    for old, new in replacements:
        assert source.count(old) == 1, f"{source.count(old)} times in pd.py: {old}"
        source = source.replace(old, new)
    return source


def write_new(path, text):
    with open(path, "x", encoding="utf8") as file:                      # never over somebody's work
        file.write(text)


def main(argv=None):
    parser = argparse.ArgumentParser("test_pd.py", description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("handout", help="a copy of pd.py with the exercises taken out")
    command.add_argument("file", metavar="FILE")
    command.add_argument("--only", nargs="+", choices=EXERCISES, default=list(EXERCISES), metavar="NAME",
                         help=", ".join(EXERCISES))
    command = commands.add_parser("grade", help="what filled-in copies get right, and what is wrong")
    command.add_argument("files", metavar="FILE", nargs="+")
    command.add_argument("--json", metavar="OUT", help="also write the results here")
    command = commands.add_parser("hunt", help="a copy of pd.py with a mistake planted")
    command.add_argument("number", metavar="N", type=int, choices=range(1, len(HUNTS) + 1),
                         help=f"1 to {len(HUNTS)}")
    command.add_argument("file", metavar="FILE", nargs="?")
    command.add_argument("--answer", action="store_true", help="what the mistake is, and why it is one")
    args = parser.parse_args(argv)
    try:
        if args.command == "grade":
            return grade_files(args.files, args.json)
        source = OFFICIAL.read_text(encoding="utf8")
        if args.command == "handout":
            write_new(args.file, handout(source, args.only))
            return print(f"{args.file}: exercises {', '.join(args.only)}")
        replacements, symptom, answer, test = HUNTS[args.number - 1]
        if args.file:
            write_new(args.file, plant(source, replacements))
        print(f"Mistake {args.number}. {symptom}")
        if args.answer:
            changes = [f"- {old.strip()}\n+ {new.strip()}" for old, new in replacements]
            print(answer, *changes, f"caught by {test}...", sep="\n")
    except (OSError, UnicodeError) as error:
        parser.error(tidy(error))


# ------------------------------------------------------------------------------------------------------------
# 5. Tests of the kit
# ------------------------------------------------------------------------------------------------------------
ALPHA, SIGMA = "torch.sin(FIRST_ANGLE + span * (1 - t))", "torch.sin(FIRST_ANGLE + span * t)"
V, V_EPS = "alpha * z - sigma * out", "sigma * z + alpha * out"
LOG_SNR, SNR = "2 * torch.log(alpha / sigma)", "torch.exp(log_snr(t))"
EPS, X = "(z - sigma * out) / alpha, out", "out, (z - alpha * out) / sigma"
MEAN, DDIM = ".reshape(len(z), -1).mean(1)", "alpha * x_hat + sigma * eps_hat"
VARIANCE = "sigma_s**(1 - noise_scale) * sigma_t**noise_scale"
CLIP = 'to_x_eps(x_hat.clamp(-1, 1), z, t, "x") if clip else (x_hat, eps_hat)'
PREDICT = "model(ddim_step(x_hat, eps_hat, s), s)"
STUDENT_T = "torch.randint(1, steps + 1, (batch_size,), device=x.device) / steps"
WRONG_ANSWERS = {                   # exercise: [(an answer, a plausible wrong one, what a message must say)]
    "alpha_sigma": [(f"{ALPHA}, {SIGMA}", "(t * math.pi / 2).cos(), (t * math.pi / 2).sin()", "inf, not 20"),
                    (f"{ALPHA}, {SIGMA}", f"{SIGMA}, {ALPHA}", "t = 0 is -20, not 20"),
                    (ALPHA, "torch.cos(FIRST_ANGLE + span * t)", "keep their digits in float32")],
    "log_snr": [(LOG_SNR, "torch.log(alpha / sigma)", "λ_t at t = 0 is 10, not 20"),
                (LOG_SNR, "2 * torch.log(sigma / alpha)", "λ_t at t = 0 is -20, not 20"),
                (LOG_SNR, "(alpha / sigma)**2", "λ_t at t = 0.5 is 1, not 0")],
    "v": [(f"{V}, {V_EPS}", "sigma * z - alpha * out, alpha * z + sigma * out", "at t = 0 z is the data"),
          (f"{V}, {V_EPS}", "alpha * z + sigma * out, sigma * z - alpha * out", "gives back the x and ε"),
          (f"{V}, {V_EPS}", f"{V_EPS}, {V}", "x first")],
    "eps": [(EPS, "z - sigma * out, out", "α_t x̂ + σ_t ε̂ = z"),
            (EPS, "(z - out) / alpha, out", "α_t x̂ + σ_t ε̂ = z"),
            (EPS, "out, (z - sigma * out) / alpha", "x first")],
    "x": [(X, "out, z - alpha * out", "α_t x̂ + σ_t ε̂ = z"),
          (X, "out, (z - out) / sigma", "α_t x̂ + σ_t ε̂ = z"),
          (X, "(z - alpha * out) / sigma, out", "x first")],
    "both": [("x_out, eps_out = out", "eps_out, x_out = out", "x first"),
             ("x_hat = sigma**2 * x_out", "x_hat = sigma * x_out", "x̂ at t = 0.1"),
             ("alpha**2 * eps_out + sigma * (z - alpha * x_out)", "eps_out", "α_t x̂ + σ_t ε̂ = z")],
    "loss_weight": [("clamp(min=1)", "clamp(max=1)", "w at t = 1 is 2.0612e-09, not 1"),
                    (SNR, "log_snr(t)", '||ε - ε̂||² with "snr"'),
                    (SNR, "torch.exp(log_snr(t) / 2)", "the 'snr' loss at t = 0.1")],
    "weighted_loss": [(MEAN, ".mean()", "has nothing to do with the others"),
                      (MEAN, ".reshape(len(z), -1).sum(1)", "the mean over its pixels"),
                      ("loss_weight(t, weighting) * (x_target", "(x_target", "w(λ_t) times")],
    "ddim_step": [(DDIM, "sigma * x_hat + alpha * eps_hat", "made of the same x and ε"),
                  (DDIM, "alpha * x_hat + sigma * torch.randn_like(x_hat)", "made of the same x and ε"),
                  (DDIM, "alpha * x_hat + (1 - alpha) * eps_hat", "z_s at s = 0.1")],
    "ancestral_step": [
        (VARIANCE, "sigma_t**(1 - noise_scale) * sigma_s**noise_scale", "the posterior's with noise_scale 0"),
        ("(1 - ratio).sqrt()", "(1 - ratio)", "the deviation with noise_scale = 0"),
        (VARIANCE, "(sigma_s + noise_scale * (sigma_t - sigma_s))", "the log-variance is half way")],
    "heun_step": [(PREDICT, PREDICT[:-2] + "t)", "the time is 1.0 for t = 1 and s = 0.5"),
                  (PREDICT, "model(z, s)", "the z that it gets"),
                  ("(eps_hat + eps_end) / 2", "(eps_hat + eps_end)", "with the same x̂ and ε̂ at the end")],
    "sample": [("range(steps, 0, -1)", "range(steps, 1, -1)", "ddim with N = 1 asks at no time"),
               ('"ddim" or s == 0', '"ddim"', "adds no noise"),
               (CLIP, "(x_hat.clamp(-1, 1) if clip else x_hat), eps_hat", "ε̂ fits the clipped x̂")],
    "distill_target": [
        ("return x_tilde / (alpha_over_sigma(s) - alpha_over_sigma(t))", "return x_hat", "it misses by"),
        ("(t * (substeps - i) + s * i)", "(t * i + s * (substeps - i))", "is asked at 0.3, 0.6"),
        ("        z = ddim_step(x_hat, eps_hat, end)\n", "", "where its last step has led it")],
    "train": [(STUDENT_T, "torch.rand(batch_size, device=x.device).clamp(min=1 / steps)", "at no others"),
              (STUDENT_T, STUDENT_T.replace("1, steps + 1", "0, steps"), "with N = 1 its times are 0"),
              ("x = distill_target(teacher,", "_ = distill_target(teacher,", "all 0.5 is 0.5, not 2")],
    "time_embedding": [("1000 * t[:, None]", "t[:, None]", "1000 t"),
                       ("[angles.cos(), angles.sin()]", "[angles.sin(), angles.cos()]", "sin at t = 0"),
                       ("device=t.device) / (dim // 2)", "device=t.device) / dim", "would reach 1/10000")],
}


def score_here(pd, name):
    """`score` without a process of its own: the other exercises' functions are given for a while."""
    kept = dict(vars(pd))
    vars(pd).update(given(name))
    try:
        return score(pd, name)
    finally:
        vars(pd).update(kept)


@pytest.mark.parametrize("name", EXERCISES)
def test_wrong_answers_get_a_message_that_helps(source, name):
    assert len(WRONG_ANSWERS[name]) == 3
    for answer, wrong, clue in WRONG_ANSWERS[name]:
        pd = load(plant(source, [(answer, wrong)]))
        failures = [failure for _, failure in score_here(pd, name) if failure]
        assert any(clue in failure for failure in failures), failures


@pytest.mark.parametrize("number", range(1, len(HUNTS) + 1))
def test_every_planted_mistake_is_caught(source, number):
    replacements, _, _, name = HUNTS[number - 1]
    (test,) = [test for key, test in globals().items() if key.startswith(name)]
    pd = load(plant(source, replacements))
    with pytest.raises(AssertionError):
        for mark in getattr(test, "pytestmark", [None]):
            for value in mark.args[1] if mark else [None]:
                test(pd, **({mark.args[0]: value} if mark else {}))


def test_one_solution_turns_one_exercise_green(source):
    """All exercises but one are taken out, or all: these say so, and the one that is there has full marks."""
    for solved in [None, *EXERCISES]:
        pd = load(handout(source, [name for name in EXERCISES if name != solved]))
        for number, name in enumerate(EXERCISES, 1):
            failures = {failure for _, failure in score_here(pd, name)}
            message = f"not filled in yet: exercise {number}: {EXERCISES[name]}"
            assert failures == {None if name == solved else message}


def test_handout_keeps_signatures_docstrings_and_all_the_rest(source):
    def outline(text):
        return [(node.name, ast.get_docstring(node), ast.unparse(node.args)) for node in ast.parse(text).body
                if isinstance(node, ast.FunctionDef)]
    assert outline(handout(source)) == outline(source)
    pd = load(handout(source))
    assert pd.frechet_distance(torch.eye(3), torch.eye(3)) < 1e-9 and tuple(pd.WEIGHTINGS) == WEIGHTINGS
    assert len(trained(load(handout(source, ["heun_step", "sample"])), 2)[2]) == 2


def test_command_line_hands_out_grades_and_hunts(source, tmp_path, capsys):
    handed, filled, hunted, grades, none = (str(tmp_path / name) for name in "abcde")
    main(["handout", handed, "--only", "v", "heun_step"])
    assert Path(handed).read_text(encoding="utf8").count("raise NotImplementedError") == 2
    Path(filled).write_text(source, encoding="utf8")
    main(["grade", filled, "--json", grades])
    total = sum(map(len, GRADED.values()))
    assert f"{total}/{total}" in capsys.readouterr().out
    (submission,) = json.loads(Path(grades).read_text(encoding="utf8"))
    assert all(exercise["points"] == exercise["of"] for exercise in submission["exercises"].values())
    main(["hunt", "9", hunted])
    assert Path(hunted).read_text(encoding="utf8") == plant(source, HUNTS[8][0])
    main(["hunt", "9", "--answer"])
    assert HUNTS[8][2] in capsys.readouterr().out
    for bad in (["handout", filled], ["grade", none], ["hunt", "99"], ["handout", none, "--only", "y"]):
        with pytest.raises(SystemExit, match="2"):
            main(bad)


def test_mischief_costs_its_exercise_and_no_more(source):
    bodies = {"alpha_sigma": ("while True: pass", "endless loop"), "log_snr": ("sys.exit(0)", "SystemExit"),
              "weighted_loss": ("os._exit(0)", "an exit or a crash"),
              "ddim_step": ("os.system('true')", "PermissionError"),
              "heun_step": (f"exec(open({str(OFFICIAL)!r}).read(), globals())", "PermissionError"),
              "distill_target": ("return torch.zeros_like(z)", "it misses by")}
    text = handout(source, list(bodies))
    for name, (body, _) in bodies.items():
        number = list(EXERCISES).index(name) + 1
        text = plant(text, [(f'raise NotImplementedError("exercise {number}: {EXERCISES[name]}")', body)])
    patch = """
import gc, inspect
for f in filter(inspect.isfunction, gc.get_objects()):
    if f.__name__ in ("check", "close", "score", "allclose", "assert_close") and not f.__closure__:
        f.__code__ = (lambda *args, **kwargs: True).__code__
"""
    loop = "    for i in range(steps, 0, -1):"
    text = plant(text, [(loop, f"    print('x' * 10**7)\n{loop}"), ("\n# ---- 6. Network", f"{patch}# ---- 6. Network")])
    with Grader(seconds=5) as grader:
        results = grader.grade(text, [*bodies, "sample"])
        ends = grader.grade("import sys; sys.exit(0)", ["v"]) | grader.grade("def x(:", ["x"])
    for name, (_, clue) in bodies.items():
        assert clue in str(results[name][0][1]), results[name]
    assert not any(failure for _, failure in results["sample"]), results["sample"]
    assert all("SystemExit" in failure for _, failure in ends["v"]) and "invalid syntax" in ends["x"][0][1]


# ------------------------------------------------------------------------------------------------------------
# 6. The network, the data and the evaluation
# ------------------------------------------------------------------------------------------------------------
sys.path.insert(0, str(OFFICIAL.parent))
import pd as program                                            # what follows tests the official file alone


def tiny_net(channels=1, **options):
    torch.manual_seed(0)
    return program.UNet(channels, **{"width": 8, **options})


def awake(net):
    """A network whose last layers are not zero, as after training."""
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2) if p.ndim > 1 else torch.nn.init.normal_(p, 0.5, 0.2)
    return net.eval()


@pytest.mark.parametrize("channels, size, mults", [(1, 8, (1, 2)), (3, 12, (1, 2, 2)), (2, 5, (1,)), (4, 32, (1, 1, 2, 2))])
def test_unet_takes_any_channels_and_any_size_it_can_halve(channels, size, mults):
    net = awake(tiny_net(channels, mults=mults, attention=(2,), out_channels=2 * channels))
    z, t = torch.randn(2, channels, size, size), torch.rand(2)
    assert net(z, t).shape == (2, 2 * channels, size, size)
    assert net(torch.cat([z, z], 3), t).shape == (2, 2 * channels, size, 2 * size)


def test_unet_says_which_sizes_it_can_halve():
    with pytest.raises(ValueError, match="10x12.*multiples of 4"):
        tiny_net(mults=(1, 1, 1))(torch.zeros(1, 1, 12, 10), torch.zeros(1))


def test_fresh_unet_predicts_zero_and_a_trained_one_uses_t_and_each_example_alone():
    z, t = torch.randn(3, 1, 8, 8), torch.tensor([0.1, 0.5, 0.9])
    assert tiny_net()(z, t).abs().max() == 0
    net = awake(tiny_net(attention=(1, 2)))
    out = net(z, t)
    assert not torch.allclose(out[:1], net(z[:1], t[1:2]), atol=1e-3)                   # t matters
    assert torch.allclose(out[1:2], net(z[1:2], t[1:2]), atol=1e-4, rtol=1e-4)          # its neighbours don't
    wide = net.to(memory_format=torch.channels_last)(z.to(memory_format=torch.channels_last), t)
    assert torch.allclose(out, wide, atol=1e-4, rtol=1e-4)


def test_attention_sees_the_whole_picture_and_convolution_does_not():
    def reaches(net):
        z = torch.zeros(1, 1, 64, 64, requires_grad=True)
        awake(net)(z, torch.zeros(1))[0, 0, 0, 0].backward()
        return z.grad[0, 0, -1, -1] != 0
    # GroupNorm's statistics tie all pixels together, so it is left out here
    nets = [tiny_net(mults=(1, 1), attention=attention) for attention in ((), (2,))]
    for net in nets:
        for module in list(net.modules()):
            for name, child in module.named_children():
                if isinstance(child, torch.nn.GroupNorm):
                    setattr(module, name, torch.nn.Identity())
    assert [bool(reaches(net)) for net in nets] == [False, True]


def test_presets_build_networks_of_the_announced_size():
    def parameters(preset):
        return sum(p.numel() for p in program.build(program.COMMON | preset, "cpu").parameters())
    assert 30e6 < parameters(program.LARGE) < 40e6
    assert parameters(program.PRESETS["digits"]) < 1e6


def save_pictures(folder, arrays, suffix="png"):
    folder.mkdir(parents=True, exist_ok=True)
    for i, array in enumerate(arrays):
        Image.fromarray(np.asarray(array, np.uint8)).save(folder / f"{i}.{suffix}")


def test_readme_names_functions_and_tests_that_exist():
    rows = [row.split("|") for row in (OFFICIAL.parent / "README.md").read_text().splitlines() if "| `test_" in row]
    assert len(rows) == 8
    for row in rows:
        for name in re.findall(r"`(\w+)`", "".join(row[2:])):
            assert name in globals() if name.startswith("test_") else hasattr(program, name), name


def test_digits_are_the_real_ones_in_uint8():
    from sklearn.datasets import load_digits
    images, labels = program.load_dataset("digits")
    assert images.dtype == torch.uint8 and images.shape == (1797, 1, 8, 8) and labels.bincount().min() > 170
    assert np.abs(images[:, 0].numpy() / 255 - load_digits().images / 16).max() < 0.5 / 255 + 1e-9


def test_digits_need_no_torchvision(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert len(program.load_dataset("digits")[0]) == 1797
    with pytest.raises(ValueError, match="mnist could not be loaded"):
        program.load_dataset("mnist", "nowhere")


def test_folder_flat_or_a_subfolder_a_class_grey_or_colour(tmp_path):
    rng = np.random.default_rng(0)
    grey, colour = rng.integers(0, 256, (3, 6, 6)), rng.integers(0, 256, (2, 6, 6, 3))
    save_pictures(tmp_path / "flat", grey)
    images, labels = program.load_dataset(str(tmp_path / "flat"))
    assert (images[:, 0].numpy() == grey).all() and images.shape[1] == 1 and labels.tolist() == [0, 0, 0]
    save_pictures(tmp_path / "classes" / "a", grey)
    save_pictures(tmp_path / "classes" / "b", colour)
    images, labels = program.load_dataset(str(tmp_path / "classes"))
    assert images.shape == (5, 3, 6, 6) and labels.tolist() == [0, 0, 0, 1, 1]
    assert (images[3:].permute(0, 2, 3, 1).numpy() == colour).all() and (images[0].numpy() == grey[0]).all()


def test_size_resizes_the_shorter_side_and_crops_the_centre(tmp_path):
    wide = np.zeros((8, 16), np.uint8)
    wide[:, 4:12] = 200                                         # the centre square is bright, the rest black
    save_pictures(tmp_path / "wide", [wide, wide.T])
    images, _ = program.load_dataset(str(tmp_path / "wide"), size=4)
    assert images.shape == (2, 1, 4, 4) and images[..., 1:-1].float().mean() > 190
    assert program.load_dataset("digits", size=16)[0].shape == (1797, 1, 16, 16)


def test_mnist_and_cifar10_are_read_from_torchvisions_files(tmp_path, monkeypatch):
    datasets = pytest.importorskip("torchvision").datasets
    rng = np.random.default_rng(0)
    raw, pixels, labels = tmp_path / "MNIST" / "raw", rng.integers(0, 256, (5, 28, 28), np.uint8), np.arange(5, dtype=np.uint8)
    raw.mkdir(parents=True)
    for split in ("train", "t10k"):
        (raw / f"{split}-images-idx3-ubyte").write_bytes(bytes([0, 0, 8, 3]) + np.array([5, 28, 28], ">i4").tobytes() + pixels.tobytes())
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1]) + np.array([5], ">i4").tobytes() + labels.tobytes())
    images, found = program.load_dataset("mnist", tmp_path)
    assert (images[:, 0].numpy() == pixels).all() and found.tolist() == labels.tolist()

    folder, pixels = tmp_path / "cifar-10-batches-py", rng.integers(0, 256, (4, 3, 32, 32), np.uint8)
    folder.mkdir()
    for name, content in (("data", {"data": pixels.reshape(4, -1), "labels": [3, 1, 2, 0]}), ("meta", {"label_names": list("abcd")})):
        (folder / name).write_bytes(pickle.dumps(content))
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [["data", None]])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [])
    monkeypatch.setattr(datasets.CIFAR10, "meta", {"filename": "meta", "key": "label_names", "md5": None})
    images, found = program.load_dataset("cifar10", tmp_path)
    assert (images.numpy() == pixels).all() and found.tolist() == [3, 1, 2, 0]


def test_flips_mirror_half_of_the_pictures_and_only_where_asked():
    data = torch.arange(16, dtype=torch.uint8).reshape(1, 1, 4, 4)
    program.set_seed(0)
    x = program.draw(data, 1000, flip=True)
    plain = data.float() / 127.5 - 1
    mirrored = (x == plain.flip(-1)).flatten(1).all(1)
    assert 400 < mirrored.sum() < 600 and ((x == plain).flatten(1).all(1) | mirrored).all()
    assert (program.draw(data, 100, flip=False) == plain).all()
    assert program.LARGE["flip"] and not any((program.COMMON | preset)["flip"] for preset in program.PRESETS.values())      # no mirrored digits


def test_frechet_distance_of_gaussians_has_its_closed_form():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(500, 3)) @ rng.normal(size=(3, 3)), rng.normal(size=(400, 3)) + [1, 2, 3]
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    expected = ((a.mean(0) - b.mean(0))**2).sum() + np.trace(cov_a + cov_b - 2 * scipy.linalg.sqrtm(cov_a @ cov_b).real)
    assert program.frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert program.frechet_distance(a, a + 2) == pytest.approx(12, rel=1e-9)                 # a shift by 2 in 3 dimensions
    a -= a.mean(0)
    assert program.frechet_distance(3 * a, a) == pytest.approx(4 * np.trace(cov_a), rel=1e-9)        # (3 - 1)² tr C
    flat = np.hstack([a, np.zeros((500, 2))])                                           # a singular covariance
    assert program.frechet_distance(flat, flat) == pytest.approx(0, abs=1e-9)
    for wrong in ((a[:1], b), (a, b[:, :2]), (a[:, 0], b)):
        with pytest.raises(ValueError, match="two sets"):
            program.frechet_distance(*wrong)


def test_generate_gives_every_model_the_same_noise_and_the_same_first_pictures(monkeypatch):
    monkeypatch.setattr(program, "CHUNK", 4)
    seen = []
    def model(z, t):
        seen.append(z)
        return torch.tanh(z), torch.zeros_like(z)
    ten, three = (program.generate(model, num, (1, 2, 2), 1, seed=5) for num in (10, 3))
    assert ten.dtype == torch.uint8 and ten.shape == (10, 1, 2, 2) and (ten[:3] == three).all()
    noise = torch.cat(seen[:3])
    assert len(noise.flatten().unique()) == 40 and abs(noise.mean()) < 0.5 and 0.6 < noise.std() < 1.4
    assert (program.generate(model, 10, (1, 2, 2), 1, seed=6) != ten).any()
    white = program.generate(lambda z, t: (torch.full_like(z, 7), z * 0), 2, (1, 2, 2), 1)
    assert (white == 255).all()                                 # x = 1 and all above is white


def test_tile_puts_pictures_in_rows():
    images = torch.arange(3, dtype=torch.uint8).reshape(3, 1, 1, 1).expand(3, 3, 2, 2) + 1
    grid = program.tile(images, 2)
    assert grid.shape == (4, 4, 3) and grid[::2, ::2, 0].tolist() == [[1, 2], [3, 0]]


# ------------------------------------------------------------------------------------------------------------
# 7. Training
# ------------------------------------------------------------------------------------------------------------
class Line(torch.nn.Module):
    """net(z, t) = w z + b: two numbers to train."""

    def __init__(self, w=0.0):
        super().__init__()
        self.w, self.b = torch.nn.Parameter(torch.tensor(w)), torch.nn.Parameter(torch.tensor(0.0))

    def forward(self, z, t):
        return self.w * z + self.b


POINTS = torch.tensor([[-1.0], [1.0]])


def test_teacher_ends_as_the_average_of_its_weights_and_students_as_they_are(monkeypatch):
    path = []
    step = torch.optim.Adam.step
    def recording(self, *args, **kwargs):
        result = step(self, *args, **kwargs)
        path.append(self.param_groups[0]["params"][0].item())
        return result
    monkeypatch.setattr(torch.optim.Adam, "step", recording)
    model = program.Denoiser(Line())
    program.train(model, POINTS, 30, lr=0.1, ema=0.8)
    average = 0.0
    for update, w in enumerate(path):
        decay = min(0.8, (1 + update) / (10 + update))
        average = decay * average + (1 - decay) * w
    assert model.net.w.item() == pytest.approx(average, rel=1e-5) and abs(average - path[-1]) > 1e-3
    path.clear()
    student = program.Denoiser(Line(0.5))
    program.train(student, POINTS, 10, teacher=model, steps=4, lr=0.1)
    assert student.net.w.item() == path[-1]


def test_learning_rate_warms_up_for_a_teacher_and_falls_to_zero_for_a_student():
    teacher = program.Denoiser(Line())
    rates = [row["lr"] for row in program.train(teacher, POINTS, 6, lr=1.0, warmup=4, every=1)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])
    rates = [row["lr"] for row in program.train(program.Denoiser(Line()), POINTS, 4, lr=1.0, teacher=teacher, steps=1, every=1)]
    assert rates == pytest.approx([1, 0.75, 0.5, 0.25])


def test_dropout_is_for_the_teacher_only():
    class Probe(Line):
        def forward(self, z, t):
            modes.add((self.training, torch.is_grad_enabled()))
            return super().forward(z, t)
    modes = set()
    teacher = program.Denoiser(Probe())
    program.train(teacher, POINTS, 2)
    assert modes == {(True, True)} and not teacher.training
    modes.clear()
    program.train(program.Denoiser(Probe()), POINTS, 2, teacher=teacher, steps=2)
    assert modes == {(False, True), (False, False)}


def test_training_finds_the_best_linear_denoiser():
    """For data of variance 1 and E x = 0, E[v | z] = 0 at every t: w = b = 0 is the minimum of every weighting."""
    data = torch.randn(4096, 1, generator=torch.Generator().manual_seed(0))
    data = (data - data.mean()) / data.std()
    for weighting in ("truncated", "snr+1"):
        model = program.Denoiser(Line(1.0))
        rows = program.train(model, data, 300, lr=0.05, batch_size=512, weighting=weighting)
        assert abs(model.net.w.item()) < 0.05 and abs(model.net.b.item()) < 0.05
        assert rows[-1]["loss"] < rows[0]["loss"]


def test_training_resumes_to_the_bit_and_any_start_gives_the_same_random_numbers():
    states = []
    def run(resume=None, report=None):
        model = program.Denoiser(tiny_net())
        rows = program.train(model, program.load_dataset("digits")[0], 6, batch_size=8, every=2, resume=resume, report=report)
        return model.state_dict(), rows
    whole, rows = run(report=lambda state: states.append(copy.deepcopy(state)))
    assert [state["update"] for state in states] == [2, 4, 6]
    again, rows_again = run(resume=states[1])
    assert rows == rows_again and all(torch.equal(whole[key], again[key]) for key in whole)


def test_a_loss_that_is_not_finite_stops_the_training():
    with pytest.raises(ValueError, match="not finite.*lower learning rate"):
        program.train(program.Denoiser(Line(math.nan)), POINTS, 3, every=1)


# ------------------------------------------------------------------------------------------------------------
# 8. The command line: a run's files, resume, wrong input, many processes
# ------------------------------------------------------------------------------------------------------------
TINY = ("--width 8 --teacher-updates 12 --student-updates 6 --stages 2 --batch-size 8 --eval-samples 8 "
        "--device cpu --no-compile").split()


def command(*args):
    """(exit status) of pd.py in this process."""
    try:
        program.main([str(arg) for arg in args])
        return 0
    except SystemExit as stop:
        return stop.code


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A finished run of digits."""
    out = tmp_path_factory.mktemp("runs") / "digits"
    assert command(*TINY, "--out", out) == 0
    return out


def same_run(a, b):
    """All of two runs that must be equal is equal: weights, log, figures, but no times."""
    for file in sorted(a.glob("*.pt")):
        one, two = (torch.load(folder / file.name, weights_only=True)["model"] for folder in (a, b))
        assert all(torch.equal(one[key], two[key]) for key in one), file.name
    assert (a / "log.csv").read_text() == (b / "log.csv").read_text()
    one, two = (json.loads((folder / "results.json").read_text()) for folder in (a, b))
    for results in (one, two):
        for stage in results["stages"]:
            del stage["seconds"], stage["images_per_second"]
    assert one == two
    assert sorted(file.name for file in a.iterdir()) == sorted(file.name for file in b.iterdir())


def test_a_run_leaves_its_files_and_its_figures(finished):
    assert sorted(file.name for file in finished.iterdir()) == [
        "config.json", "log.csv", "results.json", "samples.png", "steps.png", "student-1.pt", "student-2.pt", "teacher.pt"]
    results = json.loads((finished / "results.json").read_text())
    assert results["config"] == json.loads((finished / "config.json").read_text())
    assert [(row["model"], row["steps"], row["updates"]) for row in results["stages"]] == [
        ("teacher", 4, 12), ("student-2", 2, 12), ("student-1", 1, 12)]       # twice as many for 2 and 1 steps
    assert {(row["model"], row["steps"], row["sampler"]) for row in results["evaluation"]} == {
        ("student-2", 2, "ddim"), ("student-1", 1, "ddim"),
        *(("teacher", steps, sampler) for steps in (4, 2, 1) for sampler in ("ddim", "ancestral"))}
    by = {(row["model"], row["steps"], row["sampler"]): row for row in results["evaluation"]}
    assert by["teacher", 4, "ddim"]["rmse_to_teacher"] == 0 < by["student-1", 1, "ddim"]["rmse_to_teacher"] < 2
    assert by["teacher", 1, "ddim"]["fd"] == by["teacher", 1, "ancestral"]["fd"]        # one step has no noise to add
    assert {"device", "device_name", "torch", "processes"} <= results["environment"].keys()
    for name in ("samples.png", "steps.png"):
        assert min(Image.open(finished / name).size) > 100
    log = list(csv.DictReader(open(finished / "log.csv")))
    assert [row["model"] for row in log] == ["teacher", "student-2", "student-1"] and float(log[0]["loss"]) > 0


def test_the_evaluation_is_what_an_independent_computation_finds(finished):
    """fd and drift of the one-step student, from its weights alone."""
    teacher, student = (program.load_model(finished / f"{name}.pt")[0] for name in ("teacher", "student-1"))
    program.set_seed(0, program.EVALUATION, 0)
    z = torch.randn(256, 1, 8, 8)[:8]
    with torch.no_grad():
        x = student(z, 1.0)[0].clamp(-1, 1)
        for t, s in ((1, 0.75), (0.75, 0.5), (0.5, 0.25), (0.25, 0)):
            x_hat, eps_hat = teacher(z, t)
            z = program.alpha_sigma(s)[0] * x_hat + program.alpha_sigma(s)[1] * eps_hat
    row = [row for row in json.loads((finished / "results.json").read_text())["evaluation"] if row["model"] == "student-1"][0]
    assert row["rmse_to_teacher"] == pytest.approx((x - z.clamp(-1, 1)).square().mean().sqrt().item(), abs=0.01)
    real, _ = program.load_dataset("digits")
    images = ((x + 1) * 127.5).round().to(torch.uint8)
    program.set_seed(0, program.EVALUATION)
    real = real[torch.randperm(1797)[:80]]
    expected = program.frechet_distance(program.features(teacher.net, real), program.features(teacher.net, images))
    assert row["fd"] == pytest.approx(expected, rel=0.02)


def test_the_same_command_again_repeats_the_table_and_other_settings_are_refused(finished, capsys):
    before = {file: file.read_bytes() for file in finished.iterdir()}
    assert command(*TINY, "--out", finished) == 0 and "finished" in capsys.readouterr().out
    assert command(*TINY, "--out", finished, "--width", 16, "--seed", 3) == 2
    error = capsys.readouterr().err
    assert "seed is 0 there, 3 here" in error and "width is 8 there, 16 here" in error and "--restart" in error
    assert before == {file: file.read_bytes() for file in finished.iterdir()}


def test_restart_overwrites_a_run_and_more_evaluation_samples_do_not_train_again(finished, tmp_path, capsys):
    out = shutil.copytree(finished, tmp_path / "run")
    weights = (out / "teacher.pt").read_bytes()
    (out / "latest.pt.part").write_text("left by a process that was killed")
    assert command(*TINY, "--out", out, "--eval-samples", 12) == 0
    assert not (out / "latest.pt.part").exists()
    assert json.loads((out / "results.json").read_text())["config"]["eval_samples"] == 12
    assert (out / "teacher.pt").read_bytes() == weights
    assert command(*TINY, "--out", out, "--seed", 1, "--restart") == 0
    assert (out / "teacher.pt").read_bytes() != weights and "updates" in capsys.readouterr().out


def test_substeps_and_final_steps_give_the_ladder_of_students(tmp_path):
    assert command(*TINY, "--out", tmp_path / "run", "--substeps", 3, "--final-steps", 2, "--param", "both",
                   "--weighting", "snr+1", "--seed", 5) == 0
    assert sorted(file.name for file in (tmp_path / "run").glob("*.pt")) == ["student-2.pt", "student-6.pt", "teacher.pt"]
    info = torch.load(tmp_path / "run" / "teacher.pt", weights_only=True)
    assert info["stage"]["steps"] == 18 and info["config"]["param"] == "both"


def test_a_folder_of_pictures_goes_through_training_evaluation_and_sampling(tmp_path, monkeypatch):
    save_pictures(tmp_path / "pictures" / "a", np.random.default_rng(0).integers(0, 256, (6, 20, 24, 3)), "jpg")
    monkeypatch.chdir(tmp_path)
    assert command(*TINY, "--dataset", "pictures", "--size", 16) == 0
    assert command("--sample", "runs/pictures/student-1.pt", "--num", 5, "--out", "x.png") == 0
    assert Image.open("x.png").mode == "RGB" and Image.open("x.png").size == (96, 64)   # 3 columns, 2 rows, twice 16


def test_sample_writes_a_grid_an_npz_or_a_folder_of_the_same_pictures(finished, tmp_path, capsys):
    sample = ("--sample", finished / "student-2.pt", "--num", 5, "--seed", 7)
    for out in ("x.npz", "folder", "grid.png", "deep/er/x.npz"):
        assert command(*sample, "--out", tmp_path / out) == 0
    array = np.load(tmp_path / "x.npz")["arr_0"]
    assert array.shape == (5, 8, 8, 1) and array.dtype == np.uint8
    pictures = [np.array(Image.open(file)) for file in sorted((tmp_path / "folder").iterdir())]
    assert len(pictures) == 5 and (np.stack(pictures) == array[..., 0]).all()
    grid = np.array(Image.open(tmp_path / "grid.png"))[::4, ::4]
    assert grid.shape == (16, 24) and (grid[:8, :8] == array[0, ..., 0]).all() and (grid[8:, 8:16] == array[4, ..., 0]).all()
    assert command(*sample, "--out", tmp_path / "other.npz", "--steps", 1) == 0
    assert (np.load(tmp_path / "other.npz")["arr_0"] != array).any()
    for sampler in program.SAMPLERS:
        assert command("--sample", finished / "teacher.pt", "--num", 2, "--steps", 3, "--sampler", sampler,
                       "--out", tmp_path / f"{sampler}.npz") == 0
    assert command(*sample, "--out", tmp_path / "folder") == 2  # pictures of two commands never mix
    assert "new or empty" in capsys.readouterr().err and len(list((tmp_path / "folder").iterdir())) == 5


def spoil(path, kind, finished):
    """Something that is not a checkpoint of pd.py, at path."""
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {path}.ran",)
    if kind == "text":
        path.write_text("no checkpoint")
    elif kind == "truncated":
        path.write_bytes((finished / "teacher.pt").read_bytes()[:-1000])
    elif kind == "foreign":
        torch.save({"weights": torch.zeros(3)}, path)
    elif kind == "code":
        torch.save({"config": {}, "stage": {}, "log": [], "model": Evil()}, path)
    elif kind == "other net":
        content = torch.load(finished / "teacher.pt", weights_only=True)
        torch.save(content | {"config": content["config"] | {"width": 16}}, path)


@pytest.mark.parametrize("kind", ["missing", "text", "truncated", "foreign", "code", "other net"])
def test_what_is_no_checkpoint_is_one_line_and_its_code_never_runs(kind, finished, tmp_path, capsys):
    path = tmp_path / "x.pt"
    spoil(path, kind, finished)
    assert command("--sample", path, "--out", tmp_path / "x.png") == 2
    assert one_error(capsys) and not (tmp_path / "x.png").exists() and not (tmp_path / "x.pt.ran").exists()
    if kind not in ("missing", "other net"):                    # the same as the state of a run to be continued
        out = tmp_path / "run"
        out.mkdir()
        shutil.copy(finished / "config.json", out)
        shutil.copy(path, out / "latest.pt")
        assert command(*TINY, "--out", out) == 2 and "--restart" in one_error(capsys)
        assert not (tmp_path / "x.pt.ran").exists()


def one_error(capsys):
    """The one line that wrong input leaves on stderr."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("pd.py: error: ") and len(lines[0]) < 600, lines
    return lines[0]


NUMERIC = ("size stages final-steps substeps teacher-updates student-updates batch-size width lr student-lr eval-samples "
           "seed").split()
WRONG = {                                                       # what is given: a word that the error must hold
    "--dataset nothing-like-it": "no data set", "--dataset empty": "holds 0 pictures", "--dataset text": "not a readable",
    "--dataset mixed": "give --size", "--dataset oblong": "give --size", "--dataset deep": "8 bits", "--dataset one": "at least 2",
    "--dataset mnist": "could not be loaded", "--dataset digits --size 7": "multiples of", "--device cuda:99": "no device",
    "--device tpu": "no device", "--device cuda:x": "no device", "--out file": "file", "--out file/below": "file",
    "--out /proc/nowhere": "/proc", "--stages 13 --substeps 3": "8192", "--stages x": "whole number", "--param w": "invalid choice",
    "--weighting none": "invalid choice", "--unknown": "unrecognized", "--stage 3": "unrecognized", "--lr": "expected one",
    "--num 3": "needs --sample", "--steps 3": "needs --sample", "--sampler ddim": "needs --sample", "--seed 1.5": "whole number",
    "--batch-size 1e3": "whole number", "--out foreign": "no config.json", "--out damaged": "damaged",
    "--sample student-2.pt --steps 3": "divide", "--sample student-2.pt --steps 4": "divide", "--sample student-2.pt --lr 1": "does not go",
    "--sample student-2.pt --num 0": "whole number", "--sample student-2.pt --steps 9999": "whole number",
    "--sample student-2.pt --sampler euler": "invalid choice", "--sample student-2.pt --out file/x.png": "file",
    "--sample student-2.pt --out file": "", "--sample config.json": "is no checkpoint", "--sample .": "is no checkpoint",
    "--sample latest.pt": "is no checkpoint", "--lr 1e9 --teacher-updates 40": "not finite",
    **{f"--{name} {value}": "number" for name in NUMERIC for value in ("-1", "1e99", "nan", "word")},
    **{f"--{name} 0": "number" for name in NUMERIC if name != "seed"},
}


@pytest.fixture(scope="session")
def corner(finished, tmp_path_factory):
    """A folder with all that the wrong commands speak of."""
    folder = tmp_path_factory.mktemp("corner")
    for name in ("empty", "text", "foreign", "damaged"):
        (folder / name).mkdir()
    (folder / "file").write_text("a file")
    (folder / "text" / "a.png").write_text("no picture")
    (folder / "text" / "b.png").write_text("no picture")
    (folder / "foreign" / "teacher.pt").write_text("somebody's")
    (folder / "damaged" / "config.json").write_text("{")
    save_pictures(folder / "mixed", [np.zeros((8, 8)), np.zeros((16, 16))])
    save_pictures(folder / "oblong", [np.zeros((8, 12))] * 2)
    save_pictures(folder / "one", [np.zeros((8, 8))])
    (folder / "deep").mkdir()
    for name in "ab":
        Image.fromarray(np.zeros((8, 8), np.int32)).save(folder / "deep" / f"{name}.tif")
    for name in ("student-2.pt", "config.json"):
        shutil.copy(finished / name, folder)
    torch.save({"stage": 0}, folder / "latest.pt")
    return folder


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_input_is_one_line_with_status_2_and_leaves_nothing_behind(wrong, corner, monkeypatch, capsys):
    monkeypatch.chdir(corner)
    monkeypatch.setitem(sys.modules, "torchvision", None)       # no download is ever tried here
    before = sorted(corner.rglob("*"))
    settings = [] if "--sample" in wrong else TINY
    assert command(*settings, *wrong.split()) == 2
    assert WRONG[wrong] in one_error(capsys)
    left = set(corner.rglob("*")) - set(before)
    assert not left or "not finite" in WRONG[wrong]             # that one had begun: its last good state stays
    shutil.rmtree(corner / "runs", ignore_errors=True)


def test_an_interrupted_download_is_one_line(monkeypatch, tmp_path, capsys):
    datasets = pytest.importorskip("torchvision").datasets
    def interrupted(*args, **kwargs):
        raise RuntimeError("File not found or corrupted.")
    monkeypatch.setattr(datasets, "CIFAR10", interrupted)
    assert command("--dataset", "cifar10", "--data-dir", tmp_path, "--out", tmp_path / "run") == 2
    assert "repeat the command" in one_error(capsys) and not (tmp_path / "run").exists()


def test_fid_says_what_to_install_before_anything_is_trained(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    assert command(*TINY, "--fid", "--out", tmp_path / "run") == 2
    assert "torchmetrics[image]" in one_error(capsys) and not (tmp_path / "run").exists()


def test_fid_is_reported_where_torchmetrics_is_there(monkeypatch, tmp_path):
    class Metric:
        """In the place of torchmetrics' class: three numbers a picture instead of 2,048."""
        def __init__(self):
            self.inception = torch.nn.Identity()
            self.inception.forward = encode
    def encode(images):
        assert images.dtype == torch.uint8 and images.shape[1:] == (3, 8, 8)
        return images[:, 0, 3:6, 3].float()
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", types.SimpleNamespace(FrechetInceptionDistance=Metric))
    assert command(*TINY, "--fid", "--out", tmp_path / "run") == 0
    rows = json.loads((tmp_path / "run" / "results.json").read_text())["evaluation"]
    assert all(math.isfinite(row["fid"]) for row in rows)
    real = program.load_dataset("digits")[0]
    program.set_seed(0, program.EVALUATION)
    real = real[torch.randperm(1797)[:80]][:, 0, 3:6, 3]
    fake = program.generate(program.load_model(tmp_path / "run" / "student-1.pt")[0], 8, (1, 8, 8), 1)[:, 0, 3:6, 3]
    assert [row["fid"] for row in rows if row["model"] == "student-1"] == [pytest.approx(program.frechet_distance(real, fake))]


# Runs that are killed: a small program that imports pd once and forks a child for each try.
KILLER = """
import json, os, random, resource, signal, sys, time
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
import pd
pd.SAVE_SECONDS = 0
pd.train.__kwdefaults__["every"] = 3
args, kills = json.loads(sys.argv[2]), json.loads(sys.argv[3])
pd.load_dataset("digits")

def attempt(kill):
    child = os.fork()
    if child:
        if kill and kill[0] in ("after", "ctrl-c"):
            time.sleep(kill[1])
            os.kill(child, signal.SIGKILL if kill[0] == "after" else signal.SIGINT)
        return os.waitpid(child, 0)[1]
    if kill and kill[0] == "write":                             # die while the n-th file is being written
        replace, count = os.replace, iter(range(10**9))
        os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL) if next(count) == kill[1] else replace(*paths)
    if kill and kill[0] == "full":                              # no file may grow beyond that many bytes
        resource.setrlimit(resource.RLIMIT_FSIZE, (kill[1], kill[1]))
    status = 0
    try:
        pd.main(args)
    except SystemExit as stop:
        status = stop.code
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

print(json.dumps([attempt(kill) for kill in kills]))
"""


def attempts(out, *kills):
    """The wait statuses of one try per entry of `kills`, and what they left on stderr."""
    args = [*TINY, "--out", str(out)]
    done = subprocess.run([sys.executable, "-c", KILLER, str(OFFICIAL.parent), json.dumps(args), json.dumps(kills)],
                          capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    assert attempts(out, None)[0] == [0]
    return out


def test_a_run_killed_at_ten_moments_ends_as_if_it_had_not_been(undisturbed, tmp_path):
    delays = [random.Random(0).uniform(0, 0.4) for _ in range(5)]
    kills = [("write", 0), ("write", 4), ("write", 5), ("after", delays[0]), ("write", 8), ("after", delays[1]),
             ("after", delays[2]), ("write", 7), ("after", delays[3]), ("write", 6), ("after", delays[4]), None]
    statuses, _ = attempts(tmp_path / "run", *kills)
    assert statuses[-1] == 0 and statuses.count(signal.SIGKILL) >= 6    # others may have ended before their kill
    same_run(undisturbed, tmp_path / "run")


def test_ctrl_c_ends_in_one_line_and_the_same_command_continues(undisturbed, tmp_path):
    statuses, errors = attempts(tmp_path / "run", ("ctrl-c", 0.3), None)
    assert [os.waitstatus_to_exitcode(status) for status in statuses] in ([130, 0], [0, 0])
    assert "Traceback" not in errors and errors.count("\n") == statuses.count(130 << 8)
    same_run(undisturbed, tmp_path / "run")


def test_a_full_disk_is_one_line_and_the_same_command_continues(undisturbed, tmp_path):
    statuses, errors = attempts(tmp_path / "run", ("full", 30_000), ("full", 100), None)
    assert [os.waitstatus_to_exitcode(status) for status in statuses] == [2, 2, 0]
    assert errors.count("pd.py: error: ") == errors.count("\n") == 2
    same_run(undisturbed, tmp_path / "run")


MORE = ("--width 16 --teacher-updates 200 --student-updates 100 --stages 1 --batch-size 16 --eval-samples 300 "
        "--lr 1e-3 --student-lr 5e-4 --device cpu").split()


@pytest.fixture(scope="session")
def alone(tmp_path_factory):
    """What one process makes of MORE."""
    out = tmp_path_factory.mktemp("runs") / "alone"
    assert command(*MORE, "--out", out) == 0
    return out


def torchrun(out, *args):
    """pd.py in two processes that save often."""
    (out.parent / "often.py").write_text(f"import sys\nsys.path.insert(0, {str(OFFICIAL.parent)!r})\nimport pd\n"
                                         "pd.SAVE_SECONDS = 0\npd.main()\n")
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            out.parent / "often.py", *args, "--out", out]
    return subprocess.Popen([str(word) for word in line], env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def same_model(a, b):
    """Two runs agree up to rounding."""
    assert sorted(file.name for file in a.iterdir()) == sorted(file.name for file in b.iterdir())
    for name in ("teacher.pt", "student-1.pt"):
        one, two = (torch.cat([w.flatten() for w in torch.load(run / name, weights_only=True)["model"].values()])
                    for run in (a, b))
        assert (one - two).norm() / one.norm() < 1e-4, name
    one, two = (json.loads((run / "results.json").read_text()) for run in (a, b))
    assert one["config"] == two["config"]
    for x, y in zip(one["evaluation"], two["evaluation"], strict=True):
        assert x["fd"] == pytest.approx(y["fd"], rel=0.02) and x["model"] == y["model"]
        assert x["rmse_to_teacher"] == pytest.approx(y["rmse_to_teacher"], abs=0.01)
    return two["environment"]["processes"]


def test_a_batch_must_be_shared_evenly(monkeypatch):
    monkeypatch.setattr(program, "WORLD", 3)
    args = program.parse_args(["--dataset", "digits"])          # batches of 64
    with pytest.raises(ValueError, match="multiple of 3"):
        program.settings(args, torch.device("cpu"))


@pytest.mark.parametrize("job", [("--benchmark",), ("--sample", "student-1.pt")])
def test_sampling_and_benchmark_are_for_one_process(job, monkeypatch, capsys):
    monkeypatch.setattr(program, "WORLD", 2)
    assert command(*job, "--device", "cpu") == 2 and "without torchrun" in one_error(capsys)


def test_two_processes_train_the_model_that_one_trains(alone, tmp_path):
    run = torchrun(tmp_path / "two", *MORE)
    output, _ = run.communicate(timeout=300)
    assert run.returncode == 0, output
    assert same_model(alone, tmp_path / "two") == 2
    assert output.count("student-1 ") == 1                      # one process speaks


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for the processes in /proc")
def test_a_process_that_dies_ends_the_run_with_an_error_and_one_process_continues_what_two_began(alone, tmp_path):
    out = tmp_path / "run"
    run = torchrun(out, *MORE)
    try:
        while not (out / "latest.pt").exists() and run.poll() is None:
            time.sleep(0.01)
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        output, _ = run.communicate(timeout=300)
    finally:
        run.kill()
    assert run.returncode != 0 and not (out / "results.json").exists(), output
    assert command(*MORE, "--out", out) == 0
    assert same_model(alone, out) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_gpu_agrees_with_the_cpu_and_compiled_with_plain(tmp_path):
    """Within bfloat16: predictions, samples, and the losses of a run; on the GPU a run repeats itself."""
    net = awake(tiny_net(width=32, attention=(2,)))
    z, t = torch.randn(16, 1, 8, 8), torch.rand(16)
    cpu = program.Denoiser(net)
    gpu = program.Denoiser(copy.deepcopy(net).cuda())
    compiled = program.Denoiser(copy.deepcopy(net).cuda())
    compiled.net.compile()
    with torch.no_grad():
        scale = cpu(z, t)[0].std()
        for other in (gpu, compiled):
            assert (cpu(z, t)[0] - other(z.cuda(), t.cuda())[0].cpu()).std() < 0.02 * scale
            assert (program.sample(cpu, z, 4) - program.sample(other, z.cuda(), 4).cpu()).std() < 0.05 * scale
    settings = [*TINY[:-3], "--device", "cuda", "--teacher-updates", 40]
    for name, flags in (("plain", ["--no-compile"]), ("again", ["--no-compile"]), ("compiled", ["--compile"])):
        assert command(*settings, *flags, "--out", tmp_path / name) == 0
    plain, again, compiled = (json.loads((tmp_path / name / "results.json").read_text())["stages"]
                              for name in ("plain", "again", "compiled"))
    for a, b, c in zip(plain, again, compiled):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.02) and a["loss"] == pytest.approx(c["loss"], rel=0.1)


def test_benchmark_measures_training_and_sampling(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(program, "CHUNK", 2)
    assert command("--benchmark", "--width", 8, "--batch-size", 4, "--device", "cpu", "--out", tmp_path / "b.json") == 0
    result = json.loads((tmp_path / "b.json").read_text())
    assert [row["job"] for row in result["rows"]] == ["teacher update", "student update", "sampling, 1 step",
                                                      "sampling, 256 steps"]
    rows = {row["job"]: row for row in result["rows"]}
    flops = {job: row["tflops"] / row["images_per_second"] for job, row in rows.items()}         # of an image
    assert flops["sampling, 256 steps"] == pytest.approx(256 * flops["sampling, 1 step"], rel=1e-6)
    assert 1.6 < flops["student update"] / flops["teacher update"] < 1.8        # 3 passes, and 2 of the teacher's
    assert result["ceilings_tflops"].keys() == {"matmul", "conv"} and "TFLOP/s" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------
# 9. The notebook: its committed outputs, the figures that its text quotes, its exercises
# ------------------------------------------------------------------------------------------------------------
NOTEBOOK = Path(__file__).with_name("tutorial.ipynb")
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
text_of = lambda cell: "".join(cell["source"])
tags = lambda cell: cell["metadata"].get("tags", [])


def printed(cell):
    return "".join("".join(o["text"]) for o in cell.get("outputs", []) if o["output_type"] == "stream")


def sections():
    """{number: cells} of the ten numbered sections."""
    found, number = {}, None
    for cell in CELLS:
        heading = cell["cell_type"] == "markdown" and re.match(r"## (\d+)\. ", text_of(cell))
        number = int(heading[1]) if heading else number
        if number:
            found.setdefault(number, []).append(cell)
    return found


def test_notebook_is_committed_with_clean_outputs():
    assert NOTEBOOK.stat().st_size < 3e6
    counts = [c["execution_count"] for c in CELLS if c["cell_type"] == "code"]
    assert counts == list(range(1, len(counts) + 1))                    # run once, from top to bottom
    for cell in CELLS:
        for output in cell.get("outputs", []):
            assert output["output_type"] != "error" and output.get("name") != "stderr", text_of(cell)
            assert set(output.get("data", {})) <= {"image/png", "text/plain"}, text_of(cell)
        assert "warning" not in printed(cell).lower()


def test_notebook_sections_have_question_figure_number_exercise_and_take_home():
    assert list(sections()) == list(range(1, 11))
    for number, cells in sections().items():
        text = "\n".join(text_of(c) for c in cells if c["cell_type"] == "markdown")
        assert re.match(r"## \d+\. .*\n\n\*\*\*.*\?\*\*\*\n", text), number
        assert text.count("**Take home:**") == 1, number
        assert any("image/png" in o.get("data", {}) for c in cells for o in c.get("outputs", [])), number
        assert "✓" in "".join(map(printed, cells)), number
        assert number == 10 or any("exercise" in tags(c) for c in cells), number


def test_notebook_text_quotes_what_its_cells_print():
    total = 0
    for number, cells in sections().items():
        text = "\n".join(text_of(c) for c in cells if c["cell_type"] == "markdown")
        for value, says in re.findall(r"✓ .*: (\S+) \(the text says ((?:below |above )?\S+)\)", "\n".join(map(printed, cells))):
            assert re.search(rf"(?<![\d.]){re.escape(says)}(?![\d])", text), (number, says)
            *bound, quoted = says.split()
            value, quoted = float(value), float(quoted.strip("%")) / (100 if "%" in says else 1)
            assert (value < quoted if bound == ["below"] else value > quoted if bound == ["above"]
                    else value == pytest.approx(quoted, rel=0.16, abs=0.02 if quoted == 0 else 0)), (number, says)
            total += 1
    assert total > 60


def function(signature, body):
    return f"def {signature}:\n    " + body.replace("\n", "\n    ")


def forms(signature, right, *wrong):
    """A right answer and wrong ones, all bodies of one function."""
    return function(signature, right), [(function(signature, body), hint) for body, hint in wrong]


def variants(name, right, *wrong):
    return f"{name} = {right}", [(f"{name} = {value}", hint) for value, hint in wrong]


SPAN = "span = math.pi / 2 - 2 * pd.FIRST_ANGLE\n"
LANDING = """mid = (t + s) / 2
(a, b), (c, d) = pd.alpha_sigma(t), pd.alpha_sigma(s)
x1, e1 = teacher(z, t)
x2, e2 = teacher(pd.ddim_step(x1, e1, mid), mid)
z_s = pd.ddim_step(x2, e2, s)
"""
MATCH = "dict(zip(answer_8a_reports, {}))"
METHODS = '{{"Heun\'s method": "{}", "latent diffusion": "{}", "consistency models": "{}", ' \
          '"choosing 10 of 1000 times by dynamic programming": "{}", "guided distillation": "{}"}}'
REPORTS = """answer_8a_reports = list(answer_8a)
"""
RATIO = "r = lambda t: math.exp(float(pd.log_snr(t)) / 2)\nm = (t + s) / 2\n"

NOTEBOOK_EXERCISES = {
    "1a": variants("answer_1a", "0.5", ("0.7071", "not the clock"), ("0.1", "too little noise"), ("5", "not on the clock")),
    "1b": forms("time_of(lam)", SPAN + "return (math.atan(math.exp(-lam / 2)) - pd.FIRST_ANGLE) / span",
                (SPAN + "return (math.atan(math.exp(-lam)) - pd.FIRST_ANGLE) / span", "half is missing"),
                (SPAN + "return (math.atan(math.exp(lam / 2)) - pd.FIRST_ANGLE) / span", "backwards"),
                ("return math.atan(math.exp(-lam / 2)) / (math.pi / 2)", "FIRST_ANGLE")),
    "2a": variants("answer_2a", "22", ("0.001", "divides by σ"), ("0.001 * math.exp(20)", "SNR"), ("0.001 * math.exp(-10)", "upside down")),
    "2b": forms("v_of(x, eps, t)", "a, s = pd.alpha_sigma(t)\nreturn a * eps - s * x",
                ("a, s = pd.alpha_sigma(t)\nreturn s * eps - a * x", "exchanged"),
                ("a, s = pd.alpha_sigma(t)\nreturn a * eps + s * x", "sign"),
                ("a, s = pd.alpha_sigma(t)\nreturn a * x + s * eps", "z itself")),
    "2c": forms("my_reading(phi)", "return -torch.sin(phi + 0.5), torch.cos(phi + 0.5)",
                ("return 1.0, 0.0", "error of ε̂ is amplified"), ("return 0.0, 1.0", "error of x̂ is amplified"),
                ("return -torch.sin(phi), torch.cos(phi)", "this is v"), ("return -2.0, 2.0", "scale it down")),
    "3a": forms("rotate(z, v, t, s)", "d = angle(s) - angle(t)\nreturn math.cos(d) * z + math.sin(d) * v",
                ("d = angle(t) - angle(s)\nreturn math.cos(d) * z + math.sin(d) * v", "wrong way"),
                ("d = angle(s) - angle(t)\nreturn math.sin(d) * z + math.cos(d) * v", "exchanged"),
                ("return z + (angle(s) - angle(t)) * v", "Euler")),
    "3b": variants("answer_3b", "15", ("8", "both ends"), ("16", "last step"), ("9", "used again")),
    "3c": variants("my_grid", "[1, 0.5, 0.3, 0.15, 0]", ("[1, 0.9, 0.8, 0.6, 0]", "worse"), ("[1, 0.75, 0.5, 0.25, 0]", "made up its mind"), ("[1, 0.5, 0]", "five times"),
                 ("[0.9, 0.6, 0.5, 0.3, 0]", "start in the noise"), ("[1, 0.5, 0.7, 0.3, 0]", "must fall")),
    "4a": variants("answer_4a", "1.0", ("2e-9", "ε-loss"), ("2", "t = 0.5"), ("math.exp(20)", "reciprocal")),
    "4b": forms("density_of(lam)", SPAN + "t = (math.atan(math.exp(-lam / 2)) - pd.FIRST_ANGLE) / span\nreturn 2 * t / (4 * span * math.cosh(lam / 2))",
                (SPAN + "return 1 / (4 * span * math.cosh(lam / 2))", "uniform t"),
                (SPAN + "return 2 * (math.atan(math.exp(-lam / 2)) - pd.FIRST_ANGLE) / span", "change of variables"),
                (SPAN + "t = (math.atan(math.exp(-lam / 2)) - pd.FIRST_ANGLE) / span\nreturn t / (4 * span * math.cosh(lam / 2))", "one half")),
    "4c": forms("my_weight(lam)", "return torch.cosh(lam / 2)", ("return torch.ones_like(lam)", "undo the bump"),
                ("return torch.exp(lam)", "the data"), ("return torch.cosh(lam)", "overdoes")),
    "5a": forms("unfair_mean(z, t)", "a, s = pd.alpha_sigma(t)\nreturn torch.tanh(a * z / s**2 + math.log(4) / 2)",
                ("a, s = pd.alpha_sigma(t)\nreturn torch.tanh(a * z / s**2)", "equal probabilities"),
                ("a, s = pd.alpha_sigma(t)\nreturn torch.tanh(a * z / s**2 + math.log(4))", "twice too strong"),
                ("a, s = pd.alpha_sigma(t)\nreturn torch.sign(a * z / s**2 + math.log(4) / 2)", "likelier point")),
    "5b": variants("answer_5b", "2", ("1", "free"), ("4", "squares"), ("2 ** 0.5", "RMS")),
    "6a": forms("first_weight(t, s)", RATIO + "return (r(m) - r(t)) / (r(s) - r(t))", ("return 0.5", "plain mean"),
                (RATIO + "return (r(s) - r(m)) / (r(s) - r(t))", "second prediction"),
                ("a = lambda t: float(pd.alpha_sigma(t)[0])\nm = (t + s) / 2\nreturn (a(m) - a(t)) / (a(s) - a(t))", "change of α")),
    "6b": forms("v_target(teacher, z, t, s)",
                "x = pd.distill_target(teacher, z, t, s)\na, b = pd.alpha_sigma(t)\nreturn a * (z - a * x) / b - b * x",
                ("return pd.distill_target(teacher, z, t, s)", "translate"),
                ("x, e = teacher(z, t)\na, b = pd.alpha_sigma(t)\nreturn a * e - b * x", "before any distillation"),
                ("x = pd.distill_target(teacher, z, t, s)\na, b = pd.alpha_sigma(t)\nreturn a * teacher(z, t)[1] - b * x", "don't make z_t")),
    "6c": variants("answer_6c", "0.0", ("0.5", "watershed is lower"), ("-2.0", "watershed is higher"), ("0.05", "decided")),
    "7a": forms("clock(N)", "return [i / N for i in range(N, 0, -1)]", ("return [i / N for i in range(N, -1, -1)]", "never asked"),
                ("return [i / N for i in range(N - 1, -1, -1)]", "begin"), ("return [i / N for i in range(1, N + 1)]", "wrong order")),
    "7b": forms("stages(start, end, substeps)", "return round(math.log(start / end, substeps))", ("return start / end", "logarithm"),
                ("return math.log2(start / end)", "substeps = 2 only"), ("return 1 + round(math.log(start / end, substeps))", "one too many")),
    "7c": ("goal = lambda z: pd.distill_target(ideal(MOONS.double()), z.double(), 1.0, 0.0, 32).float()\n"
           "my_student = lambda z, t: pd.to_x_eps(goal(z), z, t, 'x')",
           [("my_student = lambda z, t: ideal(MOONS.double())(z.double(), t)", "huddle"), ("my_student = lambda z, t: z", "pair"),
            ("my_student = lambda z, t: (z, 2 * z)", "don't make z"), ("my_student = lambda z, t: pd.to_x_eps(z, z, t, 'x')", "not on the data")]),
    "8a": (REPORTS + "answer_8a = " + MATCH.format((3, 6, 1, 4, 2, 5)),
           [(REPORTS + "answer_8a = " + MATCH.format((4, 6, 1, 3, 2, 5)), "small before training"),
            (REPORTS + "answer_8a = " + MATCH.format((3, 6, 2, 4, 1, 5)), "few percent"),
            (REPORTS + "answer_8a = " + MATCH.format((3, 5, 1, 4, 2, 6)), "never trained at")]),
    "8b": forms("mended_target(teacher, z, t, s)", LANDING + "return (z_s - d / b * z) / (c - d / b * a)", (LANDING + "return x2", "second prediction"),
                (LANDING + "return z_s", "where the teacher lands"), (LANDING + "return x1", "first prediction"),
                (LANDING.replace("teacher(z, t)\n", "teacher(z, t)\nx1 = x1.clamp(-1, 1)\n") + "return (z_s - d / b * z) / (c - d / b * a)", "still clips")),
    "9a": variants("answer_9a", METHODS.format("sampler", "space", "training", "schedule", "training"),
                 (METHODS.format("training", "space", "training", "schedule", "training"), "averages two predictions"),
                 (METHODS.format("sampler", "space", "sampler", "schedule", "training"), "another target"),
                 (METHODS.format("sampler", "space", "training", "sampler", "training"), "other times")),
    "9b": forms("consistency_target(teacher, student, z, t, s)", "return student(pd.ddim_step(*teacher(z, t), s), s)[0]",
                ("return student(z, t)[0]", "nothing is learnt"), ("return teacher(pd.ddim_step(*teacher(z, t), s), s)[0]", "blurry mean"),
                ("return student(pd.ddim_step(*teacher(z, t), s), t)[0]", "clock")),
}


def tagged(tag):
    return [text_of(c) for c in CELLS if tag in tags(c)]


@pytest.fixture(scope="module")
def setup():
    matplotlib.use("Agg")
    space = {"__name__": "notebook"}
    for text in tagged("setup"):
        exec(text, space)
    return space


def outcome(setup, name, *answers):
    """(status, message) of an exercise with the notebook's own blank cell, then the answers, then its check cell."""
    space, out = dict(setup), io.StringIO()
    with contextlib.redirect_stdout(out):
        for text in (*tagged(f"exercise-{name}"), *answers, *tagged(f"check-{name}")):
            exec(text, space)
    return space["SCORE"][name], out.getvalue()


def test_notebook_exercises_are_all_here():
    assert [t[9:] for c in CELLS for t in tags(c) if t.startswith("exercise-")] == list(NOTEBOOK_EXERCISES)
    assert all(len(wrong) >= 3 for _, wrong in NOTEBOOK_EXERCISES.values())


@pytest.mark.parametrize("name", NOTEBOOK_EXERCISES)
def test_notebook_exercise(setup, name):
    right, wrong = NOTEBOOK_EXERCISES[name]
    assert outcome(setup, name) == ("open", f"Exercise {name}: open\n")
    assert outcome(setup, name, right) == ("right", f"Exercise {name}: right\n")
    for answer, hint in wrong:
        status, message = outcome(setup, name, answer)
        assert status == "not yet" and hint in message, message
    status, message = outcome(setup, name, re.sub(r"^def (.*):[\s\S]*", r"def \1:\n    return 'nonsense'", right) if right.startswith("def")
                              else right.split("\n")[-1].split(" = ")[0] + " = 'nonsense'")
    assert status == "not yet", message                                 # a wrong type is a message too, not a traceback


if __name__ == "__main__":
    main()
