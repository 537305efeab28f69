// Command stargz-read reads parts of one layer with the blob fetcher of the stargz snapshotter.
//
// It prints "size BYTES", and for each part "part OFFSET SECONDS SHA256". A negative offset counts
// from the end of the layer.
package main

import (
	"context"
	"crypto/sha256"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/pkg/reference"
	"github.com/containerd/stargz-snapshotter/cache"
	"github.com/containerd/stargz-snapshotter/fs/config"
	"github.com/containerd/stargz-snapshotter/fs/remote"
	"github.com/containerd/stargz-snapshotter/service/resolver"
	digest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func main() {
	if len(os.Args) < 5 {
		fmt.Fprintln(os.Stderr, "usage: stargz-read MIRROR REFERENCE DIGEST OFFSET:LENGTH...")
		os.Exit(2)
	}
	if err := run(os.Args[1], os.Args[2], os.Args[3], os.Args[4:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(mirror, ref, layer string, parts []string) error {
	spec, err := reference.Parse(ref)
	if err != nil {
		return err
	}
	mirrors := []resolver.MirrorConfig{{Host: mirror, Insecure: true}}
	hosts := resolver.RegistryHostsFromConfig(resolver.Config{
		Host: map[string]resolver.HostConfig{spec.Hostname(): {Mirrors: mirrors}},
	})
	blob, err := remote.NewResolver(config.BlobConfig{}, nil).Resolve(
		context.Background(),
		hosts,
		spec,
		ocispec.Descriptor{Digest: digest.Digest(layer)},
		cache.NewMemoryCache(),
	)
	if err != nil {
		return err
	}
	defer blob.Close()
	fmt.Println("size", blob.Size())
	for _, part := range parts {
		first, length, _ := strings.Cut(part, ":")
		offset, err := strconv.ParseInt(first, 10, 64)
		if err != nil {
			return err
		}
		count, err := strconv.Atoi(length)
		if err != nil {
			return err
		}
		if offset < 0 {
			offset += blob.Size()
		}
		data := make([]byte, count)
		begun := time.Now()
		n, err := blob.ReadAt(data, offset)
		if err != nil {
			return err
		}
		fmt.Printf("part %d %.3f %x\n", offset, time.Since(begun).Seconds(), sha256.Sum256(data[:n]))
	}
	return nil
}
