"""gRPC: servicers, interceptors, wiring, drain."""
