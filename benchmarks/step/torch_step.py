"""The AEGIS training step (docs/method.md, preset `paper`, fresh latents) in PyTorch: published and tuned.

  Published  fp32, eager, one UNet call per prediction (guidance is two), torch.optim.Adam, GRP in a loop over tensors
  Tuned      channels_last, guided pair and frozen pair stacked, same-shaped tensors updated together, fused Adam,
             optionally bfloat16 (float32 drift and moments, frozen networks pure bfloat16), with the forward passes
             that need no gradient (sampling above all) as captured CUDA graphs, or with torch.compile

Both use scaled_dot_product_attention, PyTorch's default in diffusers. v and p are kept from step to step.
"""

import numpy as np
import torch

from benchmarks import cases
from benchmarks.step.torch_nets import TextEncoder, UNet


def _fill(module, tensors):
    module.load_state_dict({key: torch.from_numpy(x) for key, x in tensors.items()}, assign=True)
    return module.requires_grad_(False)


def build(case, component, network, config):
    """A network with the case's weights, float32 on the CPU."""
    with torch.device("meta"):
        module = network(config)
    return _fill(module, case.tensors(component, {key: tuple(x.shape) for key, x in module.state_dict().items()}))


def mse(x):
    return x.float().square().mean()


class _Step:
    """What both versions share: the order of the step. Latents are (B, C, h, w) here."""

    dtype = torch.float32

    def __init__(self, case, batch: int, device: str):
        self.case, self.batch, self.device = case, batch, torch.device(device)
        self.alphas = case.alphas_cumprod.astype(np.float64)
        self.text = build(case, "text", TextEncoder, case.text).to(self.device)
        self.calls = self.evaluations = 0
        self.kept = None  # a dict to be filled by step(), where the agreement gate asks for it
        words = case.words
        concept = words.tokens(case.concept)
        with torch.no_grad():
            self.c_e, self.c_0 = (self.text(self.text.embed([words.row(*ids)])) for ids in (concept, []))
            slot = words.eos_token_id
            self.template = self.text.embed([words.row(slot, *concept)])
        self._networks()
        self.reset()

    def reset(self, drift: dict | None = None) -> None:
        """The state at step 0, or with a drift {key: array}."""
        v, p = cases.soft_tokens(self.text.embeddings.token_embedding.weight.cpu().numpy())
        self.v, self.p = (torch.from_numpy(x).to(self.device) for x in (v, p))
        self._reset(drift)

    def noise(self, net, z, t, c):
        """eps(net, z, t, c), float32; counted."""
        self.calls, self.evaluations = self.calls + 1, self.evaluations + len(z)
        return self._call(net, z.to(self.dtype), t, c.to(self.dtype).expand(len(z), -1, -1)).float()

    def _call(self, net, z, t, c):
        return net(z, t, c)

    def encode(self, soft):
        """E([BOS, soft tokens, concept, EOS, PAD...]), (1, L, D)."""
        n = 1 + len(soft)
        return self.text(torch.cat([self.template[:, :1], soft[None], self.template[:, n:]], dim=1))

    @torch.no_grad()
    def sample(self, z, c, s: int):
        """z after s guided DDIM steps with the current weights under c."""
        stride = len(self.alphas) // cases.STEPS
        for i in range(s):
            tau = 1 + stride * (cases.STEPS - 1 - i)
            empty, concept = self.guided(z, torch.full((len(z),), tau, device=self.device), c)
            eps = empty + cases.GUIDANCE * (concept - empty)
            a, b = self.alphas[tau], self.alphas[tau - stride]
            z = b**0.5 * ((z - (1 - a) ** 0.5 * eps) / a**0.5) + (1 - b) ** 0.5 * eps
        return z

    def sign_step(self, net, soft, z_t, t, goals, size):
        """(soft tokens after one sign step towards the goals, their gradient)."""
        soft = soft.detach().requires_grad_(True)
        eps = self.noise(net, z_t, t, self.encode(soft))
        (gradient,) = torch.autograd.grad(sum(mse(eps - goal) for goal in goals), soft)
        return soft.detach() - size * gradient.sign(), gradient

    def step(self, draw, mark=lambda phase: None, given: dict | None = None):
        """One training step; returns L_e on the device. mark(phase) is called as each phase ends.

        given: {"z_a", "z_b", "v", "p"} of another implementation, taken in place of what is kept here.
        """
        given = given or {}
        z_a, t_a = self._latents(draw, 0, self.c_e, "z_a", given)
        mark("sampling, attack")
        with torch.no_grad():
            eps0_concept = self.noise(self.net0, z_a, t_a, self.c_e)
            eps_concept = self.noise(self.net, z_a, t_a, self.c_e)
        args = z_a, t_a
        self.p, grad_p = self.sign_step(self.net, self.p, *args, [eps0_concept], cases.GAMMA)
        self.v, grad_v = self.sign_step(self.net0, self.v, *args, [eps0_concept, eps_concept], cases.BETA)
        self._keep(v=self.v, grad_v=grad_v, p=self.p, grad_p=grad_p)
        for name in given.keys() & {"v", "p"}:
            setattr(self, name, torch.from_numpy(given[name]).to(self.device))
        with torch.no_grad():
            c_prime, c_star = self.encode(self.v), self.encode(self.p)
        mark("sign steps")
        z_b, t_b = self._latents(draw, 1, c_prime, "z_b", given)
        mark("sampling, loss")
        with torch.no_grad():
            eps0_target, eps0_empty = self.frozen_pair(z_b, t_b, c_prime)
            goal = eps0_empty - cases.ETA * (eps0_target - eps0_empty)
        mark("target")
        loss = self._erase(z_b, t_b, c_star, goal)
        self._keep(L_e=loss)
        mark("erasure with GRP+Adam")
        return loss

    def _latents(self, draw, which: int, c, name: str, given: dict):
        """(z (B, C, h, w), t): sampled under c, or given by that name."""
        channels_first = lambda x: torch.from_numpy(x).to(self.device).permute(0, 3, 1, 2)  # noqa: E731
        z = self.sample(channels_first(draw.z_T[which]).contiguous(memory_format=self.layout), c, draw.s)
        self._keep(**{name: z.permute(0, 2, 3, 1)})
        if name in given:
            z = channels_first(given[name]).contiguous(memory_format=self.layout)
        return z, torch.from_numpy(draw.t[which]).long().to(self.device)

    def _keep(self, **values):
        if self.kept is not None:
            # Copies: a tensor on the CPU shares its memory with numpy, and gradients are projected in place.
            self.kept |= {name: x.detach().float().cpu().numpy().copy() for name, x in values.items()}


class Published(_Step):
    """As ESD's and AdvUnlearn's code is written."""

    layout = torch.contiguous_format

    def _networks(self):
        self.net0 = build(self.case, "unet", UNet, self.case.unet).to(self.device)
        self.net = build(self.case, "unet", UNet, self.case.unet).to(self.device).requires_grad_(True)

    @torch.no_grad()
    def _reset(self, drift):
        self.original = dict(self.net0.named_parameters())
        for key, parameter in self.net.named_parameters():
            parameter.copy_(self.original[key])
            if drift is not None:
                parameter += torch.from_numpy(drift[key]).to(self.device)
        self.adam = torch.optim.Adam(self.net.parameters(), lr=cases.LEARNING_RATE)
        self.omega = {key: torch.tensor(cases.OMEGA, device=self.device) for key in self.original}
        self.before = {key: torch.zeros_like(x) for key, x in self.original.items()}

    def guided(self, z, t, c):
        return self.noise(self.net, z, t, self.c_0), self.noise(self.net, z, t, c)

    def frozen_pair(self, z, t, c):
        return self.noise(self.net0, z, t, c), self.noise(self.net0, z, t, self.c_0)

    def _erase(self, z, t, c_star, goal):
        self.adam.zero_grad()
        loss = mse(self.noise(self.net, z, t, c_star) - goal)
        loss.backward()
        self._project()
        self.adam.step()
        return loss.detach()

    @torch.no_grad()
    def _project(self):
        for key, parameter in self.net.named_parameters():
            g_e, g_r = parameter.grad, parameter - self.original[key]
            dot, size = (g_e * g_r).sum(), (g_r * g_r).sum()
            projection = dot / size * g_r if size > 0 else torch.zeros_like(g_r)
            kept = torch.sign((g_e * self.before[key]).sum())
            self.omega[key] = (self.omega[key] - cases.MU * kept).clamp(0, cases.CAP)
            self._keep(**{f"g_e:{key}": g_e, f"cosine:{key}": _cosine(dot, size, (g_e * g_e).sum())})
            if dot < 0:
                parameter.grad = g_e - self.omega[key] * projection
            self.before[key] = projection


def _cosine(dot, size, g_size):
    return torch.where((size > 0) & (g_size > 0), dot / (size * g_size).sqrt().clamp_min(1e-38), 0.0)


class Tuned(_Step):
    """Every structural trick of the JAX version, in PyTorch's own means."""

    layout = torch.channels_last

    def __init__(self, case, batch, device, dtype=torch.float32, mode: str | None = None):
        self.dtype, self.capture = dtype, mode == "cudagraph"
        self.compile_mode = None if self.capture else mode
        super().__init__(case, batch, device)

    def _networks(self):
        self.module0 = build(self.case, "unet", UNet, self.case.unet)
        with torch.device("meta"):
            self.module = UNet(self.case.unet)
        self.groups = Groups(self.module0)
        self.theta0 = self.groups.take_over(self.module0, self.dtype, self.device)
        self.theta = self.groups.take_over(self.module, self.dtype, self.device)
        self.module.requires_grad_(True)
        self.net0, self.net, self.grouped_project = self.module0, self.module, _project
        if self.compile_mode:
            torch._dynamo.config.cache_size_limit = 64
            mode = None if self.compile_mode == "default" else self.compile_mode
            compiled = dict(mode=mode, dynamic=False)
            self.net0, self.net = (torch.compile(net, **compiled) for net in (self.module0, self.module))
            self.grouped_project = torch.compile(_project, dynamic=False)
        self.parameters = list(self.module.parameters())
        self.graphs: dict = {}  # {(network, latents): (captured graph, inputs, output)}

    @torch.no_grad()
    def _reset(self, drift):
        self.drift, self.gradients, self.before = (
            [torch.zeros_like(x, dtype=torch.float32) for x in self.theta] for _ in range(3)
        )
        if drift is not None:
            for key, view in self.groups.views(self.drift).items():
                view.copy_(torch.from_numpy(drift[key]))
        self.gradient_views = [self.groups.views(self.gradients)[key] for key, _ in self.module.named_parameters()]
        self.omega = [torch.full((len(x),), cases.OMEGA, device=self.device) for x in self.theta]
        for drift_group, gradient in zip(self.drift, self.gradients):
            drift_group.grad = gradient
        self.adam = torch.optim.Adam(self.drift, lr=cases.LEARNING_RATE, fused=True)
        self._refresh()

    def _refresh(self):
        """theta = theta0 + drift, in the compute type."""
        for theta, theta0, drift in zip(self.theta, self.theta0, self.drift):
            theta.copy_(theta0 + drift)

    def _call(self, net, z, t, c):
        if self.capture and not torch.is_grad_enabled():
            return self._replay(net, z, t, c)
        if self.compile_mode and self.device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
            return net(z, t, c).clone()  # a captured graph's next run overwrites its output
        return net(z, t, c)

    def _replay(self, net, *inputs):
        """The forward pass from a CUDA graph, which reads the weights where they lie: no launch costs the host time."""
        key = net, len(inputs[0])
        if key not in self.graphs:
            own = [x.clone(memory_format=torch.preserve_format) for x in inputs]
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # its trials and workspaces, before anything is captured
                for _ in range(3):
                    net(*own)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                output = net(*own)
            self.graphs[key] = graph, own, output
        graph, own, output = self.graphs[key]
        for mine, given in zip(own, inputs):
            mine.copy_(given)
        graph.replay()
        return output.clone()

    def _pair(self, net, z, t, first, second):
        c = torch.cat([first.expand(len(z), -1, -1), second.expand(len(z), -1, -1)])
        return self.noise(net, torch.cat([z, z]), torch.cat([t, t]), c).chunk(2)

    def guided(self, z, t, c):
        return self._pair(self.net, z, t, self.c_0, c)

    def frozen_pair(self, z, t, c):
        return self._pair(self.net0, z, t, c, self.c_0)

    def _erase(self, z, t, c_star, goal):
        loss = mse(self.noise(self.net, z, t, c_star) - goal)
        gradients = torch.autograd.grad(loss, self.parameters)
        with torch.no_grad():
            torch._foreach_copy_(self.gradient_views, list(gradients))
            del gradients
            if self.kept is not None:
                self._keep(**{f"g_e:{key}": g for key, g in self.groups.views(self.gradients).items()})
            self.omega, cosines = self.grouped_project(self.omega, self.gradients, self.drift, self.before)
            self.adam.step()
            self._refresh()
        if self.kept is not None:
            self._keep(**{f"cosine:{key}": x for key, x in self.groups.views(cosines).items()})
        return loss.detach()


def _project(omega, gradients, drift, before):
    """GRP in place on groups (n, ...): returns (next omegas, cosines); `before` becomes this step's projections."""
    omegas, cosines = [], []
    for g, d, b, o in zip(gradients, drift, before, omega):
        axes = list(range(1, g.ndim))
        column = [-1, *[1] * len(axes)]
        dot, size = (g * d).sum(axes), (d * d).sum(axes)
        cosines.append(_cosine(dot, size, (g * g).sum(axes)))
        o = (o - cases.MU * torch.sign((g * b).sum(axes))).clamp(0, cases.CAP)
        omegas.append(o)
        b.copy_(d * torch.where(size > 0, dot / size.clamp_min(1e-38), 0.0).view(column))
        g.sub_(b * torch.where(dot < 0, o, 0.0).view(column))
    return omegas, cosines


class Groups:
    """Same-shaped tensors of a module in one buffer (n, *shape) each, convolution kernels in channels_last order."""

    def __init__(self, module):
        self.keys: dict[tuple, list[str]] = {}
        for key, parameter in module.named_parameters():
            self.keys.setdefault(tuple(parameter.shape), []).append(key)

    def take_over(self, module, dtype, device) -> list[torch.Tensor]:
        """Moves the module's parameters into new buffers of which they become views."""
        buffers = []
        for shape, keys in self.keys.items():
            stored = (shape[0], *shape[2:], shape[1]) if len(shape) == 4 else shape
            buffer = torch.empty(len(keys), *stored, dtype=dtype, device=device)
            buffers.append(buffer.permute(0, 1, 4, 2, 3) if len(shape) == 4 else buffer)
        for key, view in self.views(buffers).items():
            owner, _, name = key.rpartition(".")
            parent = module.get_submodule(owner)
            parameter = getattr(parent, name)
            if not parameter.is_meta:
                view.copy_(parameter)
            setattr(parent, name, torch.nn.Parameter(view, requires_grad=False))
        return buffers

    def views(self, buffers) -> dict[str, torch.Tensor]:
        """{key: its part of the buffers}"""
        return {key: buffer[i] for buffer, keys in zip(buffers, self.keys.values()) for i, key in enumerate(keys)}


def make(name: str, case, batch: int, device: str, dtype: str):
    """p1 | p2 | p2-cudagraph | p2-MODE with a mode of torch.compile; p1 is float32 whatever `dtype` says."""
    kind, _, mode = name.partition("-")
    if kind == "p1":
        return Published(case, batch, device)
    return Tuned(case, batch, device, getattr(torch, dtype), mode or None)


def step_flops(found: dict[str, float], s: float, batch: int) -> float:
    """With s denoising steps for either latent: 4 s guided, 4 plain forwards, two text gradients, one full gradient."""
    return batch * ((4 * s + 4) * found["F"] + 2 * found["F+B_text"] + found["F+B"])
