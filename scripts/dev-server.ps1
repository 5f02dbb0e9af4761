# Windows: makes .venv, installs the locked requirements and starts the gateway on 127.0.0.1:8000, as `make run` does.
# Usage: .\scripts\dev-server.ps1 [-Port 8001] [PATH_TO_AGENTS]
param(
    [string]$Agents,
    [int]$Port = 8000
)

$ErrorActionPreference = "Stop"
Set-Location (Join-Path $PSScriptRoot "..")

$python = ".venv\Scripts\python.exe"
if (-not (Test-Path $python)) {
    python -c "import sys; sys.exit(sys.version_info < (3, 11))"
    if ($LASTEXITCODE -ne 0) { throw "Python 3.11 or newer is needed." }
    python -m venv .venv
    if ($LASTEXITCODE -ne 0) { throw "The virtual environment could not be made." }
}

# A stamp holds the digest of the lock that is installed, so that the second start is quick.
$stamp = ".venv\.runtime"
$digest = (Get-FileHash requirements.txt).Hash
if (-not (Test-Path $stamp) -or (Get-Content $stamp) -ne $digest) {
    & $python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.txt
    if ($LASTEXITCODE -ne 0) { throw "The requirements could not be installed." }
    Set-Content $stamp $digest
}

$env:PYTHONPATH = "src"
$arguments = @("-m", "gateway_cli", "dev", "--port", $Port)
if ($Agents) { $arguments += $Agents }
& $python @arguments
exit $LASTEXITCODE
