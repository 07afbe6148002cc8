"""The messages of the Open Inference Protocol over gRPC, for those who speak it: gateway and reference backend."""

SERVICE = "inference.GRPCInferenceService"
