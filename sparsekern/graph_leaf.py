"""Modules that are one call in a graph that torch.fx traces, as nn.Linear is."""

from torch import nn
from torch.fx import Proxy


class GraphLeaf(nn.Module):
    """A module whose forward starts with `if isinstance(x, Proxy): return self.traced(x)`."""

    def traced(self, *arguments) -> Proxy:
        """The call of this module, recorded; some of the arguments are proxies."""
        tracer = next(a for a in arguments if isinstance(a, Proxy)).tracer
        path = tracer.path_of_module(self)
        if not path:
            raise RuntimeError(
                f"{type(self).__name__}: expected torch.fx to trace a model with the layer in it, "
                "got the layer alone; put it into an nn.Sequential"
            )
        return tracer.create_proxy("call_module", path, arguments, {})

    def __prepare_scriptable__(self):
        """What torch.jit.script asks a module for."""
        raise RuntimeError(
            f"{type(self).__name__}: expected torch.compile, torch.export or torch.jit.trace, got "
            "torch.jit.script; or make the model dense with sparsekern.to_dense"
        )
