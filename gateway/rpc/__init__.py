"""The Open Inference Protocol over gRPC, for clients and to backends. Imported only where weir.yaml says `grpc`."""
