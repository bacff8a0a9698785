"""The fused ops in float64, from CONTRACT-level maths only, so that a lowered graph runs under onnx's reference evaluator."""

import numpy as np
import torch
import torch.nn.functional as F
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from stm.scan import selective_scan_ref


def wide(*arrays):
    return [torch.from_numpy(np.asarray(a, dtype=np.float64)) for a in arrays]


def conv_silu(x, weight, bias, backward):
    """x (batch, seqlen, d_inner); flipped in and out, as the published code walks backwards."""
    x = x.flip(1) if backward else x
    padded = F.pad(x.transpose(1, 2), (3, 0))
    u = F.silu(F.conv1d(padded, weight[:, None], bias, groups=weight.shape[0])).transpose(1, 2)
    return u.flip(1) if backward else u


class StmPatchRows(OpRun):
    op_domain = "stm"

    def _run(self, images, patch_size=None, stride=None, cls_index=None, precision=None, **_):
        assert precision == "fp32"
        (images,) = wide(images)
        rows = F.unfold(images, patch_size, stride=stride).transpose(1, 2)  # (batch, patches, 3 patch_size^2)
        if cls_index >= 0:
            rows = torch.cat([rows[:, :cls_index], torch.zeros_like(rows[:, :1]), rows[:, cls_index:]], 1)
        return (rows.float().numpy(),)


class StmConvXProj(OpRun):
    op_domain = "stm"

    def _run(self, xz, conv_weight, conv_bias, x_proj_weight, **_):
        xz, cw, cb, xw = wide(xz, conv_weight, conv_bias, x_proj_weight)
        x = xz[..., : xz.shape[2] // 2]
        return (torch.stack([conv_silu(x, cw[k], cb[k], k == 1) @ xw[k].T for k in (0, 1)]).float().numpy(),)


class StmMambaScan(OpRun):
    op_domain = "stm"

    def _run(self, xz, x_dbl, *rest, cls_index=None, weight_mode=None, scaled_decay=None, **_):
        fixed, extra = rest[:6], list(rest[6:])
        xz, x_dbl, cw, cb, dtw, dtb, A, D = wide(xz, x_dbl, *fixed)
        pairs = extra.pop(0) if weight_mode else None
        scale = wide(extra.pop(0))[0] if scaled_decay else None
        assert not extra
        inner, rank, state = xz.shape[2] // 2, dtw.shape[2], A.shape[2]
        x, z = xz[..., :inner], xz[..., inner:]
        total, deltas = 0, []
        for k in (0, 1):
            dt, B, C = x_dbl[k].split([rank, state, state, x_dbl.shape[3] - rank - 2 * state], -1)[:3]
            delta = F.softplus(dt @ dtw[k].T + dtb[k])
            total = total + selective_scan_ref(conv_silu(x, cw[k], cb[k], k == 1), delta, A[k], B, C, D[k], scale, k == 1)
            deltas.append((delta, B))
        y = total * F.silu(z)
        y = y if cls_index < 0 else y[:, cls_index : cls_index + 1]
        if not weight_mode:
            return (y.float().numpy(),)
        s = scale if scale is not None else torch.ones(xz.shape[1], dtype=torch.float64)
        columns = []
        for p, q in pairs:
            k = 0 if p < q else 1
            delta, B = deltas[k]
            span = range(p + 1, q + 1) if p < q else range(q, p)
            decay = torch.exp(sum(s[t] * delta[:, t] for t in span)[..., None] * A[k])
            bp, bq = (delta[:, t, :, None] * B[:, t, None] for t in (p, q))
            if weight_mode == 1:
                w = ((decay * bp * bq).sum((1, 2)) / ((bq * bq).sum((1, 2)) + 1e-12)).clamp(0, 1)
            elif weight_mode == 2:
                w = decay.mean((1, 2))
            else:
                w = (decay * bp / (bq + torch.where(bq < 0, -1e-6, 1e-6))).mean((1, 2))
            columns.append(w)
        return y.float().numpy(), torch.stack(columns, 1).float().numpy()


class StmAddMergeNorm(OpRun):
    op_domain = "stm"

    def _run(self, residual, hidden, norm_weight, *rest, merge=None, left=None, right=None, out_len=None, cls_index=None, epsilon=None, **_):
        x, h, g = wide(residual, hidden, norm_weight)
        x = x.expand(h.shape[0], -1, -1)
        x = (x if cls_index < 0 else x[:, cls_index : cls_index + 1]) + h
        if merge != "none":
            (w,) = wide(rest[0])
            w = w.expand(x.shape[0], -1)
            if merge == "edge":
                length = x.shape[1]
                groups = [([], t) for t in range(left, length - right)]
                groups[0][0].extend((p, p) for p in range(left))
                groups[-1][0].extend((p, p - (length - right) + left) for p in range(length - right, length))
            else:
                begin, members, columns = rest[1:]
                groups = []
                for i in range(out_len):
                    inside = [(int(members[j]), int(columns[j])) for j in range(begin[i], begin[i + 1])]
                    (target,) = [m for m, c in inside if c < 0]
                    groups.append(([(m, c) for m, c in inside if c >= 0], target))
            x = torch.stack([x[:, t] + sum((w[:, c, None] * x[:, m] for m, c in joins), torch.zeros(1)) for joins, t in groups], 1)
        normed = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + epsilon) * g
        return x.float().numpy(), normed.float().numpy()


class StmLinear(OpRun):
    op_domain = "stm"

    def _run(self, x, weight, *rest, normed=None, adds=None, epsilon=None, left=None, right=None, **_):
        x, weight, *rest = wide(x, weight, *rest)
        y = x @ weight.T
        if normed:
            y = y * 16 * torch.rsqrt(rest.pop(0).sum(-1, keepdim=True) / x.shape[2] + epsilon)
        if not adds:
            return (y.float().numpy(),)
        total = y + rest.pop(0)
        if left or right:
            kept, w = total[:, left : total.shape[1] - right].clone(), rest.pop(0).expand(len(total), -1)[..., None]
            kept[:, 0] += (w[:, :left] * total[:, :left]).sum(1)
            kept[:, -1] += (w[:, left:] * total[:, total.shape[1] - right :]).sum(1)
            total = kept
        squares = total.square().unflatten(-1, (-1, 16)).sum(-1)
        return tuple(t.float().numpy() for t in (total / 16, total, squares))


OPS = [StmPatchRows, StmConvXProj, StmMambaScan, StmAddMergeNorm, StmLinear]


def run_lowered(model, images):
    session = ReferenceEvaluator(model, new_ops=OPS)
    return session.run(None, {"images": images})[0]
