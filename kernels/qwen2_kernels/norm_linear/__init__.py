"""`norm_linear`: the residual stream's addition, its norm and the projection that reads it."""
