"""The AEGIS training step (method.md section 3, faithful mode) in PyTorch, as published code would have it and tuned.

  Published  fp32, eager, one UNet call per prediction (guidance is two), torch.optim.Adam, GRP in a loop over tensors
  Tuned      channels_last, guided pair and frozen pair stacked, same-shaped tensors updated together, fused Adam,
             optionally bfloat16 (float32 drift and moments, frozen networks pure bfloat16), with the forward passes
             that need no gradient (sampling above all) as captured CUDA graphs, or with torch.compile

Both use scaled_dot_product_attention, PyTorch's default in diffusers. omega follows the hypergradient rule.
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
            self.target_template = self.text.embed([words.row(slot)])
            self.prompt_template = self.text.embed([words.row(slot, *concept)])
        self._networks()
        self.reset()

    def reset(self, drift: dict | None = None) -> None:
        """The state at step 0, or with a drift {key: array}."""
        v, p = cases.soft_tokens(self.text.embeddings.token_embedding.weight.cpu().numpy())
        self.v, self.p = (torch.from_numpy(x).to(self.device) for x in (v, p))
        self.omega = torch.tensor(0.5, device=self.device)
        self._reset(drift)

    def noise(self, net, z, t, c):
        """eps(net, z, t, c), float32; counted."""
        self.calls, self.evaluations = self.calls + 1, self.evaluations + len(z)
        return self._call(net, z.to(self.dtype), t, c.to(self.dtype).expand(len(z), -1, -1)).float()

    def _call(self, net, z, t, c):
        return net(z, t, c)

    def encode(self, template, soft):
        """E(template with the soft tokens in its slots), (1, L, D)."""
        n = 1 + len(soft)
        return self.text(torch.cat([template[:, :1], soft[None], template[:, n:]], dim=1))

    @torch.no_grad()
    def sample(self, z, s: int):
        """z after s guided DDIM steps with the current weights."""
        stride = len(self.alphas) // cases.STEPS
        for i in range(s):
            tau = 1 + stride * (cases.STEPS - 1 - i)
            empty, concept = self.guided(z, torch.full((len(z),), tau, device=self.device))
            eps = empty + cases.GUIDANCE * (concept - empty)
            a, b = self.alphas[tau], self.alphas[tau - stride]
            z = b**0.5 * ((z - (1 - a) ** 0.5 * eps) / a**0.5) + (1 - b) ** 0.5 * eps
        return z

    def sign_step(self, net, template, soft, z_t, t, goals, size):
        """(soft tokens after one sign step towards the goals, their gradient)."""
        soft = soft.detach().requires_grad_(True)
        eps = self.noise(net, z_t, t, self.encode(template, soft))
        (gradient,) = torch.autograd.grad(sum(mse(eps - goal) for goal in goals), soft)
        return soft.detach() - size * gradient.sign(), gradient

    def step(self, draw, mark=lambda phase: None, given: dict | None = None):
        """One training step; returns L_e on the device. mark(phase) is called as each phase ends.

        given: {"z_t", "v", "p"} of another implementation, used instead of this one's results after they are kept.
        """
        z_T = torch.from_numpy(draw.z_T).to(self.device).permute(0, 3, 1, 2).contiguous(memory_format=self.layout)
        t = torch.from_numpy(draw.t).long().to(self.device)
        z_t = self.sample(z_T, draw.s)
        self._keep(z_t=z_t.permute(0, 2, 3, 1))
        if given:
            z_t = torch.from_numpy(given["z_t"]).to(self.device).permute(0, 3, 1, 2)
            z_t = z_t.contiguous(memory_format=self.layout)
        mark("sampling")
        with torch.no_grad():
            eps0_concept, eps0_empty = self.frozen_pair(z_t, t)
            eps_concept = self.noise(self.net, z_t, t, self.c_e)
        goals = [eps_concept, eps0_concept]
        self.v, grad_v = self.sign_step(self.net0, self.target_template, self.v, z_t, t, goals, cases.BETA)
        self._keep(v=self.v, grad_v=grad_v)
        if given:
            self.v = torch.from_numpy(given["v"]).to(self.device)
        with torch.no_grad():
            eps0_target = self.noise(self.net0, z_t, t, self.encode(self.target_template, self.v))
            goal = eps0_empty - cases.ETA * (eps0_target - eps0_empty)
        mark("AET")
        self.p, grad_p = self.sign_step(self.net, self.prompt_template, self.p, z_t, t, [eps0_concept], cases.GAMMA)
        self._keep(p=self.p, grad_p=grad_p)
        if given:
            self.p = torch.from_numpy(given["p"]).to(self.device)
        with torch.no_grad():
            c_star = self.encode(self.prompt_template, self.p)
        mark("prompt")
        loss = self._erase(z_t, t, c_star, goal, mark)
        self._keep(L_e=loss)
        mark("GRP+Adam")
        return loss

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
        self.previous = {}

    def guided(self, z, t):
        return self.noise(self.net, z, t, self.c_0), self.noise(self.net, z, t, self.c_e)

    def frozen_pair(self, z_t, t):
        return self.noise(self.net0, z_t, t, self.c_e), self.noise(self.net0, z_t, t, self.c_0)

    def _erase(self, z_t, t, c_star, goal, mark):
        self.adam.zero_grad()
        loss = mse(self.noise(self.net, z_t, t, c_star) - goal)
        loss.backward()
        mark("erasure")
        self._project()
        self.adam.step()
        return loss.detach()

    @torch.no_grad()
    def _project(self):
        omega, derivative = self.omega, 0.0
        for key, parameter in self.net.named_parameters():
            g_e, g_r = parameter.grad, parameter - self.original[key]
            if key in self.previous:
                drift, strength = self.previous[key]
                derivative = derivative - strength * ((g_e + g_r) * drift).sum()
            dot, size = (g_e * g_r).sum(), (g_r * g_r).sum()
            conflict = bool(dot < 0 and size > 0)
            strength = -dot / size if conflict else torch.zeros_like(dot)
            self._keep(**{f"g_e:{key}": g_e, f"strength:{key}": strength})
            if conflict:
                parameter.grad = g_e + omega * strength * g_r
            self.previous[key] = g_r, strength
        self.omega = (omega - cases.MU * np.sign(float(derivative))).clamp(0, 1)


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
        self.strength = [torch.zeros(len(x), device=self.device) for x in self.theta]
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

    def guided(self, z, t):
        return self._pair(self.net, z, t, self.c_0, self.c_e)

    def frozen_pair(self, z_t, t):
        return self._pair(self.net0, z_t, t, self.c_e, self.c_0)

    def _erase(self, z_t, t, c_star, goal, mark):
        loss = mse(self.noise(self.net, z_t, t, c_star) - goal)
        gradients = torch.autograd.grad(loss, self.parameters)
        mark("erasure")
        with torch.no_grad():
            torch._foreach_copy_(self.gradient_views, list(gradients))
            del gradients
            if self.kept is not None:
                self._keep(**{f"g_e:{key}": g for key, g in self.groups.views(self.gradients).items()})
            self.omega, self.strength = self.grouped_project(
                self.omega, self.gradients, self.drift, self.before, self.strength
            )
            self.adam.step()
            self._refresh()
        if self.kept is not None:
            self._keep(**{f"strength:{key}": s for key, s in self.groups.views(self.strength).items()})
        return loss.detach()


def _project(omega, gradients, drift, before, strength):
    """GRP in place on groups (n, ...): returns (next omega, strengths); `before` becomes this step's drift."""
    derivative, strengths = 0.0, []
    for g, d, b, s in zip(gradients, drift, before, strength):
        axes = list(range(1, g.ndim))
        derivative = derivative - (s * ((g + d) * b).sum(axes)).sum()
        dot, size = (g * d).sum(axes), (d * d).sum(axes)
        new = torch.where((dot < 0) & (size > 0), -dot / size.clamp_min(1e-38), 0.0)
        b.copy_(d)
        g.addcmul_(d, (omega * new).view(-1, *[1] * len(axes)))
        strengths.append(new)
    return (omega - cases.MU * torch.sign(derivative)).clamp(0, 1), strengths


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
    """method.md 3 with s denoising steps: 2 s guided, 4 plain forwards, two text gradients, one full gradient."""
    return batch * ((2 * s + 4) * found["F"] + 2 * found["F+B_text"] + found["F+B"])
