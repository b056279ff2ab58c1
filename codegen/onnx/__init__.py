"""Write ONNX, and run it: torch's own exporter translates the lowered program, ONNX Runtime says whether it means the same.

The program that comes here holds standard operators alone (`Target.portable`). torch's translation is kept, at opset 20 unless
another one is asked for; what this project adds is which program is translated, that names and bytes are the same in every run, and
that nothing is handed out before ONNX Runtime gave eager's numbers.
"""
