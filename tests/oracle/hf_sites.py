"""Hook points of Hugging Face models, by TransformerLens' names.

Independent of the code under test: nothing of steer_server, sae_models or steer_kernels is used here.
"""

import torch


def decoder_layers(model):
    body = model.base_model
    return body.layers if hasattr(body, "layers") else body.h


def hook(model, site, edit):
    """Call `edit` on the stream [tokens, d_model] of one sequence at `site`; what it returns replaces the stream.

    `edit` returning None leaves it alone. Returns the hook's handle.
    """
    _, layer, *name = site.split(".")
    module = decoder_layers(model)[int(layer)]
    name = ".".join(name)
    if name == "hook_resid_post":
        return _on_output(module, edit)
    if name == "hook_resid_pre":
        return _on_input(module, edit)
    attention = next(getattr(module, n) for n in ("self_attn", "attn", "attention") if hasattr(module, n))
    # Gemma, OLMo and GLM put a norm behind attention and MLP; what comes out of it is added to the stream.
    behind_attention, behind_mlp = attention, module.mlp
    if hasattr(module, "post_feedforward_layernorm"):
        behind_attention, behind_mlp = module.post_attention_layernorm, module.post_feedforward_layernorm
    elif hasattr(module, "post_mlp_layernorm"):
        behind_attention, behind_mlp = module.post_self_attn_layernorm, module.post_mlp_layernorm
    if name == "hook_attn_out":
        return _on_output(behind_attention, edit)
    if name == "hook_mlp_out":
        return _on_output(behind_mlp, edit)
    assert name == "mlp.hook_in"
    return _on_input(module.mlp, edit)


def _edited(stream, edit):
    """stream: [1, tokens, d_model] or [tokens, d_model]."""
    changed = edit(stream.reshape(-1, stream.shape[-1]))
    return None if changed is None else changed.to(stream.dtype).reshape(stream.shape)


def _on_output(module, edit):
    def hook(module, inputs, output):
        stream = output if isinstance(output, torch.Tensor) else output[0]
        changed = _edited(stream, edit)
        if changed is None:
            return None
        return changed if isinstance(output, torch.Tensor) else (changed, *output[1:])

    return module.register_forward_hook(hook)


def _on_input(module, edit):
    def hook(module, args, kwargs):
        name = None if args else "hidden_states"
        changed = _edited(args[0] if args else kwargs[name], edit)
        if changed is None:
            return None
        return ((changed, *args[1:]), kwargs) if args else (args, kwargs | {name: changed})

    return module.register_forward_pre_hook(hook, with_kwargs=True)
