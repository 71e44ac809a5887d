/* SPDX-License-Identifier: Apache-2.0
 * Calls that the fake libcuda lacks or never refuses, under names that libvalve stands in front of. */
int answer;
void (*during)(void); /* a release */

int cuDevicePrimaryCtxReset_v2(int device);
int cuDevicePrimaryCtxReset_v2(int device) { return device == 0 ? answer : 101; }

int cuMemRelease(unsigned long long handle);
int cuMemRelease(unsigned long long handle) 
{
    if (during)
        during();
    return handle ? answer : 1;
}
